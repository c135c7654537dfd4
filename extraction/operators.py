"""What each TFLite operator does, by TFLite's reference kernels; those that only move numbers are in layout.py.

A handler gets the run (its array module, its floating type, its limits), the operator and the operands, absent ones as
None, and returns one array or a list of them. Anything it raises says that the operands do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from math import erf, prod, sqrt
from typing import Any

import numpy as np

from .arrays import Array, Run, ints, kind
from .convolutions import CONVOLUTIONS
from .layout import LAYOUT
from .schema import DTYPES, FLOATS, Operator


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


def _cumsum(e: Run, op: Operator, a: Array, axis: Array) -> Array:
    if op.options["exclusive"] or op.options["reverse"]:
        raise ValueError("an exclusive or reversed sum")
    return e.xp.cumsum(a, axis=ints(axis)[0])


HANDLERS: dict[str, Callable[..., Any]] = {
    **LAYOUT,
    **CONVOLUTIONS,
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
    "ELU": _unary(lambda xp, a: xp.where(a > 0, a, xp.expm1(xp.minimum(a, 0)))),
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
    "CUMSUM": _cumsum,
}
