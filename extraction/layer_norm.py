"""Gain, offset and epsilon of a LayerNorm, by feeding it: exact, because the feeding is in float64."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np

from .errors import ExtractionError

# large against epsilon
_LARGE = 1e4
_CLOSE = 1e-6
Read = Callable[[np.ndarray], np.ndarray]


def layer_norm(read: Read, width: int, where: str) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Gain, offset and epsilon of `read(x) = LayerNorm(x) · gain + offset`, x (width,); None if it does not norm.

    Raises ExtractionError, which begins with `where`, for what is neither.
    """
    if width % 2:
        raise ExtractionError(f"{where}: an odd width of {width}")
    # without a mean, and of a variance that is the square of its size
    signs = 1.0 - 2.0 * (np.arange(width) % 2)

    def excess(size: float) -> np.ndarray:
        return (read(size * signs) - offset) * signs

    offset = read(np.zeros(width))
    gain = excess(_LARGE)
    if not np.isfinite(gain).all() or not gain.any():
        raise ExtractionError(f"{where} is no norm")
    if np.abs(excess(2 * _LARGE) - gain).max() > _CLOSE * np.abs(gain).max():
        return None
    best = int(np.argmax(np.abs(gain)))
    epsilon, size = 0.0, 1e-3
    for _ in range(2):
        # most precise where the input is as small as epsilon lets it count
        small = float(excess(size)[best])
        epsilon = size**2 * ((float(gain[best]) / small) ** 2 - 1) if small else -1.0
        if not 0 < epsilon < 1:
            raise ExtractionError(f"{where} has no epsilon between 0 and 1")
        size = sqrt(epsilon)
    return gain, offset, float(str(np.float32(epsilon)))


def plain_scale(read: Read, width: int, where: str) -> float:
    """The factor of `read(x) = factor · x`. Raises ExtractionError, which begins with `where`."""
    values = np.arange(1.0, width + 1)
    found = read(values) / values
    if not np.allclose(found, found[0], rtol=_CLOSE, atol=0):
        raise ExtractionError(f"{where} is neither normed nor merely scaled")
    return float(found[0])
