"""What each TFLite operator does, on NumPy or MLX arrays, by TFLite's reference kernels.

A handler gets the run (its array module, its floating type, its limits), the operator and the operands, absent ones as
None, and returns one array or a list of them. Anything it raises says that the operands do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import erf, prod, sqrt
from typing import Any, Protocol

import numpy as np

from .schema import DTYPES, FLOATS, Graph, Operator

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


def _elementwise(function: Callable[[Any, Array, Array], Array]) -> Callable[..., Array]:
    def handler(e: Run, op: Operator, a: Array, b: Array) -> Array:
        e.room(op, np.broadcast_shapes(a.shape, b.shape))
        return function(e.xp, a, b)

    return handler


def _unary(function: Callable[[Any, Array], Array]) -> Callable[..., Array]:
    return lambda e, op, a: function(e.xp, a)


def _divide(xp: Any, a: Array, b: Array) -> Array:
    if kind(a) == "f":
        return a / b
    if not np.asarray(b).all():
        raise ValueError("division by 0")
    return xp.sign(a) * xp.sign(b) * (xp.abs(a) // xp.abs(b))


def _floor_divide(xp: Any, a: Array, b: Array) -> Array:
    if kind(a) != "f" and not np.asarray(b).all():
        raise ValueError("division by 0")
    return xp.floor(a / b) if kind(a) == "f" else a // b


def _floor_mod(xp: Any, a: Array, b: Array) -> Array:
    return a - _floor_divide(xp, a, b) * b


def _power(xp: Any, a: Array, b: Array) -> Array:
    # a small whole exponent is a product: exact where pow is only close
    exponent = float(np.asarray(b).reshape(-1)[0]) if b.size == 1 else 0.0
    if exponent in (1.0, 2.0, 3.0):
        return a if exponent == 1 else a * a if exponent == 2 else a * a * a
    return xp.power(a, b)


def _gelu(e: Run, op: Operator, x: Array) -> Array:
    if op.options["approximate"]:
        return 0.5 * x * (1 + e.xp.tanh(sqrt(2 / np.pi) * (x + 0.044715 * (x * x * x))))
    if e.xp is np:
        return 0.5 * x * (1 + np.vectorize(erf, otypes=[x.dtype])(x / sqrt(2)))
    return 0.5 * x * (1 + e.xp.erf(x / sqrt(2)))


def _add_n(e: Run, op: Operator, *operands: Array) -> Array:
    return sum(operands[1:], operands[0])


def _select(e: Run, op: Operator, condition: Array, a: Array, b: Array) -> Array:
    if op.name == "SELECT" and condition.ndim == 1 and a.ndim > 1:
        condition = condition.reshape(-1, *[1] * (a.ndim - 1))
    e.room(op, np.broadcast_shapes(condition.shape, a.shape, b.shape))
    return e.xp.where(condition, a, b)


def _cast(e: Run, op: Operator, a: Array) -> Array:
    target = e.graph.tensors[op.outputs[0]].type
    if target not in DTYPES:
        raise ValueError(f"a cast to {target}")
    if target == "BOOL":
        return a != 0
    if target in FLOATS and kind(a) == "f":
        return a
    return a.astype(e.float if target in FLOATS else e.xp.int64)


def _as_is(e: Run, op: Operator, a: Array) -> Array:
    return a


def _reduction(name: str) -> Callable[..., Array]:
    def handler(e: Run, op: Operator, a: Array, axes: Array) -> Array:
        return getattr(e.xp, name)(a, axis=tuple(ints(axes)), keepdims=bool(op.options["keep_dims"]))

    return handler


def _softmax(e: Run, op: Operator, a: Array) -> Array:
    exponentials = e.xp.exp((a - a.max(axis=-1, keepdims=True)) * op.options["beta"])
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _fully_connected(e: Run, op: Operator, x: Array, weight: Array, bias: Array | None = None) -> Array:
    if op.options["weights_format"]:
        raise ValueError("shuffled weights")
    lead = x.shape[:-1] if op.options["keep_num_dims"] else (x.size // weight.shape[-1],)
    e.room(op, (*lead, weight.shape[0]), x.size * weight.shape[0] // 8)
    result = (x.reshape(-1, weight.shape[-1]) @ weight.T).reshape(*lead, weight.shape[0])
    return result if bias is None else result + bias


def _batch_matmul(e: Run, op: Operator, a: Array, b: Array) -> Array:
    a = a.swapaxes(-1, -2) if op.options["adj_x"] else a
    b = b.swapaxes(-1, -2) if op.options["adj_y"] else b
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    e.room(op, shape, prod(shape) * a.shape[-1] // 8)
    return a @ b


def _conv_2d(e: Run, op: Operator, x: Array, weight: Array, bias: Array | None = None) -> Array:
    if weight.shape[1:3] != (1, 1) or (op.options["stride_w"], op.options["stride_h"]) != (1, 1):
        raise ValueError("only a convolution of one point is a matrix product")
    e.room(op, (*x.shape[:-1], weight.shape[0]), x.size * weight.shape[0] // 8)
    result = x @ weight.reshape(weight.shape[0], -1).T
    return result if bias is None else result + bias


def _checked(indices: Array, size: int) -> np.ndarray:
    # MLX reads outside an array without a word
    indices = np.asarray(indices)
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"an index outside 0 to {size - 1}")
    return indices


def _gather(e: Run, op: Operator, table: Array, indices: Array) -> Array:
    if op.options["batch_dims"]:
        raise ValueError("batch_dims")
    axis = op.options["axis"] % table.ndim
    indices = _checked(indices, table.shape[axis])
    e.room(op, (*table.shape[:axis], *indices.shape, *table.shape[axis + 1 :]))
    return e.xp.take(table, e.array(indices), axis=axis)


def _embedding_lookup(e: Run, op: Operator, indices: Array, table: Array) -> Array:
    indices = _checked(indices, table.shape[0])
    e.room(op, (*indices.shape, *table.shape[1:]))
    return e.xp.take(table, e.array(indices), axis=0)


def _gather_nd(e: Run, op: Operator, table: Array, indices: Array) -> Array:
    indices = np.asarray(indices)
    depth = indices.shape[-1]
    e.room(op, (*indices.shape[:-1], *table.shape[depth:]))
    picks = tuple(e.array(_checked(indices[..., axis], table.shape[axis])) for axis in range(depth))
    return table[picks]


def _one_hot(e: Run, op: Operator, indices: Array, depth: Array, on: Array, off: Array) -> Array:
    size = ints(depth)[0]
    if op.options["axis"] not in (-1, indices.ndim):
        raise ValueError("an axis other than the last")
    e.room(op, (*indices.shape, size))
    return e.xp.where(indices[..., None] == e.xp.arange(size), on, off)


def _reshape(e: Run, op: Operator, a: Array, shape: Array | None = None) -> Array:
    target = op.options["new_shape"] if shape is None else ints(shape)
    if target is None:
        raise ValueError("no target shape")
    return a.reshape(tuple(target))


def _squeeze(e: Run, op: Operator, a: Array) -> Array:
    axes = op.options["squeeze_dims"]
    return a.squeeze() if axes is None else a.squeeze(axis=tuple(axes))


def _broadcast_to(e: Run, op: Operator, a: Array, shape: Array) -> Array:
    return e.xp.broadcast_to(a, e.room(op, ints(shape))) + e.xp.zeros_like(a)


def _slice(e: Run, op: Operator, a: Array, begin: Array, size: Array) -> Array:
    bounds = list(zip(ints(begin), ints(size), a.shape, strict=True))
    if any(start < 0 or (length != -1 and (length < 0 or start + length > full)) for start, length, full in bounds):
        raise ValueError("a slice outside its tensor")
    return a[tuple(slice(start, full if length == -1 else start + length) for start, length, full in bounds)]


def _strided_slice(e: Run, op: Operator, a: Array, begin: Array, end: Array, strides: Array) -> Array:
    options, picks = op.options, []
    if options["ellipsis_mask"] or options["new_axis_mask"] or options["offset"]:
        raise ValueError("an ellipsis, a new axis or an offset")
    for axis, (start, stop, step) in enumerate(zip(ints(begin), ints(end), ints(strides), strict=True)):
        if options["shrink_axis_mask"] >> axis & 1:
            picks.append(int(_checked(np.array(start % max(a.shape[axis], 1)), a.shape[axis])))
            continue
        first = None if options["begin_mask"] >> axis & 1 else start
        last = None if options["end_mask"] >> axis & 1 else stop
        picks.append(slice(first, last, step))
    return a[tuple(picks)]


def _concatenation(e: Run, op: Operator, *parts: Array) -> Array:
    e.room(op, (sum(part.size for part in parts),))
    return e.xp.concatenate(parts, axis=op.options["axis"])


def _pack(e: Run, op: Operator, *parts: Array) -> Array:
    e.room(op, (sum(part.size for part in parts),))
    return e.xp.stack(parts, axis=op.options["axis"])


def _unpack(e: Run, op: Operator, a: Array) -> list[Array]:
    axis = op.options["axis"]
    return [part.squeeze(axis=axis) for part in _split_at(e, a, len(op.outputs), axis)]


def _split_at(e: Run, a: Array, count: int, axis: int) -> list[Array]:
    if a.shape[axis] % count:
        raise ValueError(f"{a.shape[axis]} does not divide into {count}")
    return list(e.xp.split(a, count, axis=axis))


def _split(e: Run, op: Operator, axis: Array, a: Array) -> list[Array]:
    return _split_at(e, a, len(op.outputs), ints(axis)[0])


def _split_v(e: Run, op: Operator, a: Array, sizes: Array, axis: Array) -> list[Array]:
    places = np.cumsum(ints(sizes)[:-1]).tolist()
    if sum(ints(sizes)) != a.shape[ints(axis)[0]] or min(ints(sizes)) < 0:
        raise ValueError("sizes that do not add up")
    return list(e.xp.split(a, places, axis=ints(axis)[0])) if places else [a]


def _range(e: Run, op: Operator, start: Array, limit: Array, delta: Array) -> Array:
    first, last, step = (np.asarray(value).item() for value in (start, limit, delta))
    e.room(op, (max(int((last - first) / step), 0) + 1,))
    return e.array(np.arange(first, last, step))


def _fill(e: Run, op: Operator, shape: Array, value: Array) -> Array:
    return e.xp.broadcast_to(value, e.room(op, ints(shape))) + e.xp.zeros_like(value)


def _tile(e: Run, op: Operator, a: Array, repeats: Array) -> Array:
    e.room(op, (size * count for size, count in zip(a.shape, ints(repeats), strict=True)))
    return e.xp.tile(a, tuple(ints(repeats)))


def _pad(e: Run, op: Operator, a: Array, widths: Array, value: Array | None = None) -> Array:
    pairs = np.asarray(widths).reshape(-1, 2).tolist()
    if len(pairs) != a.ndim or min(min(pair) for pair in pairs) < 0:
        raise ValueError("widths that do not fit")
    e.room(op, (before + size + after for size, (before, after) in zip(a.shape, pairs, strict=True)))
    fill = 0 if value is None else np.asarray(value).reshape(-1)[0].item()
    return e.xp.pad(a, [tuple(pair) for pair in pairs], constant_values=fill)


def _reverse(e: Run, op: Operator, a: Array, axes: Array) -> Array:
    reversed_axes = [axis % a.ndim for axis in ints(axes)]
    return a[tuple(slice(None, None, -1) if axis in reversed_axes else slice(None) for axis in range(a.ndim))]


def _cumsum(e: Run, op: Operator, a: Array, axis: Array) -> Array:
    if op.options["exclusive"] or op.options["reverse"]:
        raise ValueError("an exclusive or reversed sum")
    return e.xp.cumsum(a, axis=ints(axis)[0])


HANDLERS: dict[str, Callable[..., Any]] = {
    "ADD": _elementwise(lambda xp, a, b: a + b),
    "SUB": _elementwise(lambda xp, a, b: a - b),
    "MUL": _elementwise(lambda xp, a, b: a * b),
    "DIV": _elementwise(_divide),
    "FLOOR_DIV": _elementwise(_floor_divide),
    "FLOOR_MOD": _elementwise(_floor_mod),
    "POW": _elementwise(_power),
    "SQUARED_DIFFERENCE": _elementwise(lambda xp, a, b: (a - b) * (a - b)),
    "MINIMUM": _elementwise(lambda xp, a, b: xp.minimum(a, b)),
    "MAXIMUM": _elementwise(lambda xp, a, b: xp.maximum(a, b)),
    "LESS": _elementwise(lambda xp, a, b: a < b),
    "LESS_EQUAL": _elementwise(lambda xp, a, b: a <= b),
    "GREATER": _elementwise(lambda xp, a, b: a > b),
    "GREATER_EQUAL": _elementwise(lambda xp, a, b: a >= b),
    "EQUAL": _elementwise(lambda xp, a, b: a == b),
    "NOT_EQUAL": _elementwise(lambda xp, a, b: a != b),
    "LOGICAL_AND": _elementwise(lambda xp, a, b: xp.logical_and(a, b)),
    "LOGICAL_OR": _elementwise(lambda xp, a, b: xp.logical_or(a, b)),
    "LOGICAL_NOT": _unary(lambda xp, a: xp.logical_not(a)),
    "ADD_N": _add_n,
    "NEG": _unary(lambda xp, a: -a),
    "ABS": _unary(lambda xp, a: xp.abs(a)),
    "SIGN": _unary(lambda xp, a: xp.sign(a)),
    "EXP": _unary(lambda xp, a: xp.exp(a)),
    "LOG": _unary(lambda xp, a: xp.log(a)),
    "SQRT": _unary(lambda xp, a: xp.sqrt(a)),
    "RSQRT": _unary(lambda xp, a: 1 / xp.sqrt(a)),
    "SQUARE": _unary(lambda xp, a: a * a),
    "SIN": _unary(lambda xp, a: xp.sin(a)),
    "COS": _unary(lambda xp, a: xp.cos(a)),
    "TANH": _unary(lambda xp, a: xp.tanh(a)),
    "LOGISTIC": _unary(lambda xp, a: 1 / (1 + xp.exp(-a))),
    "FLOOR": _unary(lambda xp, a: xp.floor(a)),
    "CEIL": _unary(lambda xp, a: xp.ceil(a)),
    "ROUND": _unary(lambda xp, a: xp.round(a)),
    "RELU": _unary(lambda xp, a: xp.maximum(a, 0)),
    "RELU6": _unary(lambda xp, a: xp.minimum(xp.maximum(a, 0), 6)),
    "RELU_0_TO_1": _unary(lambda xp, a: xp.minimum(xp.maximum(a, 0), 1)),
    "RELU_N1_TO_1": _unary(lambda xp, a: xp.minimum(xp.maximum(a, -1), 1)),
    "LEAKY_RELU": lambda e, op, a: e.xp.where(a > 0, a, a * op.options["alpha"]),
    "GELU": _gelu,
    "SELECT": _select,
    "SELECT_V2": _select,
    "CAST": _cast,
    "DEQUANTIZE": _as_is,
    "QUANTIZE": _as_is,
    "MEAN": _reduction("mean"),
    "SUM": _reduction("sum"),
    "REDUCE_MAX": _reduction("max"),
    "REDUCE_MIN": _reduction("min"),
    "REDUCE_PROD": _reduction("prod"),
    "REDUCE_ANY": _reduction("any"),
    "REDUCE_ALL": _reduction("all"),
    "SOFTMAX": _softmax,
    "FULLY_CONNECTED": _fully_connected,
    "BATCH_MATMUL": _batch_matmul,
    "CONV_2D": _conv_2d,
    "GATHER": _gather,
    "GATHER_ND": _gather_nd,
    "EMBEDDING_LOOKUP": _embedding_lookup,
    "ONE_HOT": _one_hot,
    "RESHAPE": _reshape,
    "SQUEEZE": _squeeze,
    "EXPAND_DIMS": lambda e, op, a, axis: e.xp.expand_dims(a, ints(axis)[0]),
    "TRANSPOSE": lambda e, op, a, axes: e.xp.transpose(a, tuple(ints(axes))),
    "BROADCAST_TO": _broadcast_to,
    "SLICE": _slice,
    "STRIDED_SLICE": _strided_slice,
    "CONCATENATION": _concatenation,
    "PACK": _pack,
    "UNPACK": _unpack,
    "SPLIT": _split,
    "SPLIT_V": _split_v,
    "SHAPE": lambda e, op, a: e.array(np.array(a.shape, np.int64)),
    "RANK": lambda e, op, a: e.array(np.array(a.ndim)),
    "RANGE": _range,
    "FILL": _fill,
    "ZEROS_LIKE": lambda e, op, a: e.xp.zeros_like(a),
    "TILE": _tile,
    "PAD": _pad,
    "PADV2": _pad,
    "REVERSE_V2": _reverse,
    "CUMSUM": _cumsum,
}
