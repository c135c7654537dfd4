"""TFLite operators that move numbers about and change none, by TFLite's reference kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import Array, Run, ints
from .schema import Operator


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


LAYOUT: dict[str, Callable[..., Any]] = {
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
}
