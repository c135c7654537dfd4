"""Identifying what a graph computes between two of its matrix products, by feeding it and looking.

Between products a T5 only norms, moves, masks and activates. Whatever operators an exporter wrote for that, feeding
the products' outputs with numbers of our choice and reading the next product's input tells which channel went where
and by which formula. In float64, whole numbers below 2^53 come through unharmed, so that maps and gains are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import log2

import numpy as np

from .errors import ExtractionError
from .evaluate import Evaluator
from .graph import Wiring

# large against epsilon, small against the clamps of half-precision exports at 64504
_LARGE = 1e4
_EXACT = 1e-9
_ACTIVATIONS = {
    "relu": lambda u: np.maximum(u, 0),
    "gelu": lambda u: _gelu(u, np.sqrt(2 / np.pi), 0.044715),
    "gelu with half-precision constants": lambda u: _gelu(u, 0.7978515625, 0.044708251953125),
}


def _gelu(u: np.ndarray, a: float, b: float) -> np.ndarray:
    return 0.5 * u * (1 + np.tanh(a * (u + b * (u * u * u))))


@dataclass(frozen=True)
class Stage:
    """A tensor of `length` rows (positions) by `channels`, in that order in memory whatever its shape."""

    tensor: int
    channels: int


def shaped(value: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """`value` in another shape of as many elements. Raises ExtractionError where it has not as many."""
    if value.size != np.prod(shape, dtype=object):
        raise ExtractionError(f"{where}: {list(value.shape)} where {list(shape)} was expected")
    return value.reshape(shape)


def _split(states: np.ndarray, stages: Sequence[Stage]) -> dict[Stage, np.ndarray]:
    """Channels counted over all stages, cut into each stage's own."""
    ends = np.cumsum([stage.channels for stage in stages])
    return {stage: states[:, end - stage.channels : end] for stage, end in zip(stages, ends, strict=True)}


class Probe:
    """Feeds stages of a graph and reads others; `mask` is fed with ones unless told otherwise.

    Each method raises ExtractionError where the graph does not compute what it looks for.
    """

    def __init__(self, wiring: Wiring, evaluator: Evaluator, length: int, mask: int) -> None:
        self._wiring, self._evaluator = wiring, evaluator
        self.length, self.mask = length, mask

    def read(
        self,
        feeds: Mapping[Stage, np.ndarray],
        target: int,
        mask: np.ndarray | None = None,
        extra: Mapping | None = None,
    ) -> np.ndarray:
        """The target tensor, for stages fed with (length, channels) or what broadcasts to it."""
        given: dict[int, np.ndarray] = dict(extra or {})
        for stage, value in feeds.items():
            given[stage.tensor] = np.broadcast_to(value, (self.length, stage.channels))
        given[self.mask] = np.ones(self._wiring.shape(self.mask)) if mask is None else mask
        return self._evaluator.run(given, [target])[0]

    def rows(self, value: np.ndarray, where: str, channels: int) -> np.ndarray:
        """`value` as (positions, channels)."""
        return shaped(value, (max(value.size // max(channels, 1), 1), channels), where)

    def norm(
        self,
        residual: Sequence[Stage],
        target: int,
        where: str,
        pick: slice = slice(None),
        extra: Mapping | None = None,
    ) -> tuple[np.ndarray, float]:
        """Gain (float32) and epsilon of `target[pick] = rms_norm(sum of the residual stages)`."""
        width = residual[0].channels

        def read(feeds: Mapping[Stage, np.ndarray]) -> np.ndarray:
            feeds = {**dict.fromkeys(residual, np.zeros(1)), **feeds}
            return self.rows(self.read(feeds, target, extra=extra), where, width)[pick]

        large = read({residual[0]: np.full(1, _LARGE)})
        gain = large[0]
        best = int(np.argmax(np.abs(gain)))
        if not np.isfinite(gain).all() or gain[best] == 0:
            raise ExtractionError(f"{where} is no norm of the residual stream")
        epsilon, size = 0.0, 1e-3
        for _ in range(2):
            # most precise where the stream is as small as epsilon lets it count
            small = read({residual[0]: np.full(1, size)})[0, best]
            epsilon = size**2 * ((gain[best] / small) ** 2 - 1) if small else -1.0
            if not 0 < epsilon < 1:
                raise ExtractionError(f"{where} has no epsilon between 0 and 1")
            size = float(np.sqrt(epsilon))
        rng = np.random.default_rng(0)
        feeds = {stage: rng.standard_normal((self.length, width)) for stage in residual}
        found = read(feeds)
        total = sum(feeds.values())[: len(found)]
        expected = total / np.sqrt((total**2).mean(-1, keepdims=True) + epsilon) * gain
        if not _agree(found, expected):
            raise ExtractionError(f"{where} is no RMS norm of the residual stream")
        return gain.astype(np.float32), float(str(np.float32(epsilon)))

    def scores(self, sources: Sequence[Stage], target: int, heads: int, where: str) -> tuple[np.ndarray, np.ndarray]:
        """What an attention's scores are made of: `scores[h] = q[h] @ k[h]ᵀ + bias[h]`.

        Returns (heads, 2, d_kv) channels of q and of k, counted over all sources, and the bias (heads, T, T) with every
        position real. One position holds the channels' numbers, the others each pick one channel.
        """
        length, total = self.length, sum(stage.channels for stage in sources)
        if length < 2:
            raise ExtractionError(f"{where} has a single position, which tells nothing")

        def read(states: np.ndarray) -> np.ndarray:
            return shaped(self.read(_split(states, sources), target), (heads, length, length), where)

        bias = read(np.zeros((length, total)))
        states = np.random.default_rng(0).standard_normal((length, total))
        found = read(states) - bias

        def fits(channels: np.ndarray) -> bool:
            q, k = (states[:, channels[:, side]].transpose(1, 0, 2) for side in (0, 1))
            # one entry tells most wrong guesses; all of them prove the right one
            return abs(q[0, 0] @ k[0, 1] - found[0, 0, 1]) < _EXACT and _agree(found, q @ k.swapaxes(1, 2))

        for channels in _usual_layouts(total, heads):
            if fits(channels):
                return channels, bias
        pairs: list[list[tuple[int, int]]] = [[] for _ in range(heads)]
        for first in range(0, total, length - 1):
            chosen = np.arange(first, min(first + length - 1, total))
            coded = np.zeros((length, total))
            coded[0] = np.arange(1, total + 1)
            coded[1 + np.arange(len(chosen)), chosen] = 1
            met = np.rint((read(coded) - bias)[:, 0, 1 : 1 + len(chosen)]).astype(np.int64)
            for head, place in zip(*np.nonzero(met), strict=True):
                pairs[head].append((int(met[head, place]) - 1, int(chosen[place])))
        sizes = {len(head) for head in pairs}
        if len(sizes) != 1 or not pairs[0] or not all(0 <= q < total for head in pairs for q, _ in head):
            raise ExtractionError(f"{where} is no product of queries and keys in {heads} heads")
        channels = np.array([sorted(head) for head in pairs]).transpose(0, 2, 1)
        if not fits(channels):
            raise ExtractionError(f"{where}: the scores are not q·kᵀ + bias")
        return channels, bias

    def context(self, weights: int, sources: Sequence[Stage], target: int, heads: int, where: str) -> np.ndarray:
        """Head and value channel, counted over all sources, of each channel of `target = softmax @ values`."""
        length, total = self.length, sum(stage.channels for stage in sources)

        def read(attention: np.ndarray, states: np.ndarray) -> np.ndarray:
            value = self.read(_split(states, sources), target, extra={weights: attention})
            return self.rows(value, where, value.size // length)

        identity = np.broadcast_to(np.eye(length), (heads, length, length))
        numbered = np.broadcast_to(np.arange(1, total + 1), (length, total))
        channels = np.rint(read(identity, numbered)[0]).astype(np.int64) - 1
        number = np.arange(1, heads + 1)[:, None, None]
        head = np.rint(read(identity * number, np.ones((length, total)))[0]).astype(np.int64) - 1
        if channels.min() < 0 or channels.max() >= total or head.min() < 0 or head.max() >= heads:
            raise ExtractionError(f"{where} is no product of attention and values")
        rng = np.random.default_rng(0)
        attention, states = rng.standard_normal((heads, length, length)), rng.standard_normal((length, total))
        expected = np.stack([attention[h] @ states[:, c] for h, c in zip(head, channels, strict=True)], -1)
        if not _agree(read(attention, states), expected):
            raise ExtractionError(f"{where}: the context is not attention @ values")
        return np.stack([head, channels], -1)

    def feed_forward(self, sources: Sequence[Stage], target: int, width: int, where: str) -> tuple[str, np.ndarray]:
        """The activation's name, and the channels (width, 1) it works on, or (width, 2) with the channels it gates."""
        total = sum(stage.channels for stage in sources)
        if total not in (width, 2 * width):
            raise ExtractionError(f"{where}: {total} channels become {width}, which no T5 does")

        def read(states: np.ndarray) -> np.ndarray:
            found = []
            for first in range(0, len(states), self.length):
                rows = states[first : first + self.length]
                fed = np.concatenate([rows, np.ones((self.length - len(rows), total))])
                found.append(shaped(self.read(_split(fed, sources), target), (self.length, width), where)[: len(rows)])
            return np.concatenate(found)

        # far above 0 any activation passes its input on, far below it gives 0: the numbers' bits come through as signs
        bits = np.arange(total) >> np.arange(int(log2(total)) + 1)[:, None] & 1
        signs = 1 - 2 * bits
        plus, minus = read(64.0 * signs), read(-64.0 * signs)
        powers = 1 << np.arange(len(bits))[:, None]
        channels = [((np.abs(plus) < 1) * powers).sum(0)]
        if total == 2 * width:
            channels.append(((np.where(np.abs(plus) < 1, -minus, plus) < 0) * powers).sum(0))
        channels = np.stack(channels, -1)
        if channels.shape[0] != width or sorted(channels.reshape(-1)) != list(range(total)):
            raise ExtractionError(f"{where} is no activation, gated or not, of the channels before it")
        states = np.random.default_rng(0).standard_normal((self.length, total)) * 3
        found, active = read(states), states[:, channels[:, 0]]
        gate = states[:, channels[:, 1]] if total == 2 * width else 1.0
        # float32 constants of an exporter are up to 1e-7 off the formula's own
        bound = 1e-6 * max(1.0, np.abs(found).max())
        for name, activation in _ACTIVATIONS.items():
            if np.abs(found - activation(active) * gate).max() <= bound:
                return name, channels
        raise ExtractionError(f"{where}: the activation is neither relu nor gelu in its tanh form")


def _agree(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and bool(np.abs(found - expected).max() <= _EXACT * np.abs(expected).max())


def _usual_layouts(total: int, heads: int) -> Iterator[np.ndarray]:
    """Channels (heads, 2, d_kv) of q and k where both are whole blocks of the sources, heads one after the other."""
    for blocks in (2, 3):
        inner, rest = divmod(total, blocks)
        if not rest and inner % heads == 0:
            block = np.arange(inner).reshape(heads, -1)
            for q, k in permutations(range(blocks), 2):
                yield np.stack([q * inner + block, k * inner + block], 1)
