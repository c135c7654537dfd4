"""Runs slices of a TFLite graph operator by operator: the yardstick that every recovery is held against.

Numbers are real numbers here. Quantised constants are dequantised, QUANTIZE and DEQUANTIZE of computed tensors pass
their input on, and float16 tensors are not rounded: what is evaluated is the formula that the graph states with its own
constants, in float32 on MLX arrays or in float64 on NumPy's. What depends on no input is a constant of that formula and
is always computed in float32, as an interpreter does: T5's bucket boundaries come out one off in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from .arrays import Array, kind
from .errors import ExtractionError
from .graph import Linear, Wiring
from .operators import HANDLERS
from .schema import Operator

# a hostile graph may ask for any amount of work: these bounds leave a T5 of any size a wide margin
_LIVE_BYTES = 24 * 2**20
_WORK = 2 * 10**8
_WORK_PER_BYTE = 40
# operators that change no value and may see float16 as it is stored
_EXACT = ("DEQUANTIZE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "CAST")
# what NumPy, MLX and Python raise for operands that do not fit
_MISFITS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Evaluator:
    """Evaluates tensors of `wiring.graph` from fed ones.

    `xp` is numpy or mlx.core, `precision` the name of the floating type that all floats have. Raises ExtractionError
    for an operator that is not supported, operands that do not fit it, or work out of proportion to the file.
    """

    def __init__(self, wiring: Wiring, xp: Any = np, precision: str = "float64") -> None:
        self.xp, self.graph = xp, wiring.graph
        self.float = getattr(xp, precision)
        self._wiring = wiring
        self._most_bytes = _LIVE_BYTES + wiring.graph.size // 2
        self._work_left = _WORK + _WORK_PER_BYTE * wiring.graph.size
        self._constants = self if isinstance(self, Constants) else Constants(wiring)

    def run(self, feeds: Mapping[int, Any], outputs: Sequence[int]) -> list[Array]:
        """The values of `outputs`.

        `feeds` gives any tensors of the graph, in any shape of as many elements; what lies before is not evaluated.
        """
        values: dict[int, Array] = {index: self._fed(index, value) for index, value in feeds.items()}
        operators = self._operators(outputs, feeds)
        uses: dict[int, int] = {}
        for index in [*outputs, *(index for operator in operators for index in operator.inputs)]:
            uses[index] = uses.get(index, 0) + 1
        live = sum(value.nbytes for value in values.values())
        for operator in operators:
            results = self._apply(operator, [self._value(index, values) for index in operator.inputs])
            values.update(zip(operator.outputs, results, strict=False))
            live += sum(result.nbytes for result in results)
            if live > self._most_bytes:
                raise ExtractionError(f"{operator} would need more memory than a graph of this size can mean")
            for index in operator.inputs:
                uses[index] = uses.get(index, 0) - 1
                if uses[index] == 0 and index in values and index not in feeds:
                    live -= values.pop(index).nbytes
        return [self._value(index, values) for index in outputs]

    def _fed(self, index: int, value: Any) -> Array:
        tensor = self.graph.tensors[index]
        value, shape = self.array(value), tensor.shape
        value = value != 0 if tensor.type == "BOOL" else value
        if value.size != prod(shape):
            raise ExtractionError(
                f"tensor {index} has the shape {list(shape)}, where {value.size} values were expected"
            )
        return value.reshape(shape)

    def array(self, value: Any) -> Array:
        """A number or array in the types that the evaluation uses: the floating type, int64 or bool."""
        value = value if hasattr(value, "astype") else np.asarray(value)
        dtype = {"f": self.float, "b": self.xp.bool_}.get(kind(value), self.xp.int64)
        value = value if isinstance(value, type(self.xp.zeros(0))) else self.xp.array(value)
        return value if value.dtype == dtype else value.astype(dtype)

    def constant(self, index: int) -> np.ndarray:
        """The value of a tensor that depends on no input: float32, whole numbers, or float16 where it is stored so."""
        return self._constants.constant(index)

    def weight(self, linear: Linear) -> np.ndarray:
        """(outputs, inputs), float16 or float32."""
        value = self.constant(linear.weight)
        value = value.reshape(value.shape[-2:] if linear.operator.name == "BATCH_MATMUL" else (value.shape[0], -1))
        return value.T if linear.transposed else value

    def bias(self, linear: Linear) -> np.ndarray:
        """(outputs,), zeros where there is none."""
        return np.zeros(linear.channels, np.float32) if linear.bias == -1 else self.constant(linear.bias).reshape(-1)

    def _operators(self, outputs: Sequence[int], feeds: Mapping[int, Any]) -> list[Operator]:
        return self._wiring.slice(outputs, feeds)

    def _value(self, index: int, values: Mapping[int, Array]) -> Array | None:
        if index == -1:
            return None
        return values[index] if index in values else self.array(self.constant(index))

    def _apply(self, operator: Operator, operands: list[Array | None]) -> Sequence[Array]:
        handler = HANDLERS.get(operator.name)
        if handler is None:
            raise ExtractionError(f"{operator} is not supported")
        try:
            with np.errstate(all="ignore"):
                results = handler(self, operator, *operands)
        except _MISFITS as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ExtractionError(f"{operator} cannot work on its operands: {reason}") from error
        results = results if isinstance(results, (list, tuple)) else [results]
        if len(results) < len(operator.outputs):
            raise ExtractionError(f"{operator} has {len(operator.outputs)} outputs but gives {len(results)}")
        if self.xp is not np:
            self.xp.eval(*results)
        self._spend(operator, sum(result.size for result in results))
        return results

    def _spend(self, operator: Operator, work: int) -> None:
        # an operator costs Python time however little it does
        self._work_left -= work + 2000
        if self._work_left < 0:
            raise ExtractionError(f"{operator} would need more work than a graph of this size can mean")

    def room(self, operator: Operator, shape: Iterable[int], work: int = 0) -> tuple[int, ...]:
        """`shape` as a tuple, refused before it is allocated if nothing of this size is believable."""
        shape = tuple(int(size) for size in shape)
        if min(shape, default=0) < 0 or prod(shape) * 8 > self._most_bytes:
            raise ExtractionError(f"{operator} would make a tensor of shape {list(shape)}")
        self._spend(operator, work)
        return shape


class Constants(Evaluator):
    """The evaluation of what depends on no input, in float32; dequantising and layout leave float16 as it is."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring, np, "float32")
        self._kept: dict[int, np.ndarray] = {}

    def constant(self, index: int) -> np.ndarray:
        if index not in self._wiring.producer:
            return self.graph.tensors[index].values()
        if index not in self._kept:
            self._kept[index] = self.run({}, [index])[0]
        return self._kept[index]

    def _operators(self, outputs: Sequence[int], feeds: Mapping[int, Any]) -> list[Operator]:
        return self._wiring.slice(outputs, self._kept, constants=True)

    def _value(self, index: int, values: Mapping[int, Array]) -> Array | None:
        if index == -1:
            return None
        return values[index] if index in values else self.constant(index)

    def _apply(self, operator: Operator, operands: list[Array | None]) -> Sequence[Array]:
        if operator.name in _EXACT:
            return super()._apply(operator, operands)
        return super()._apply(operator, [None if value is None else self.array(value) for value in operands])
