"""What an operator's handler works with: arrays of NumPy or MLX, and the evaluation that it is part of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from .schema import Graph, Operator

Array = Any  # numpy.ndarray or mlx.core.array


class Run(Protocol):
    """What a handler may ask of the evaluation that it is part of."""

    xp: Any
    float: Any
    graph: Graph

    def array(self, value: Any) -> Array: ...

    def room(self, operator: Operator, shape: Iterable[int], work: int = 0) -> tuple[int, ...]: ...


def kind(value: Array) -> str:
    """f for a floating type, b for bool, i for whole numbers, O for objects."""
    code = getattr(value.dtype, "kind", None)
    if code is None:
        name = str(value.dtype)
        return "f" if "float" in name else "b" if "bool" in name else "i"
    return "i" if code == "u" else code


def ints(value: Array) -> list[int]:
    """Shapes, axes and indices as plain numbers."""
    return [int(item) for item in np.asarray(value).reshape(-1)[:64]]
