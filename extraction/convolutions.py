"""TFLite's convolutions, by its reference kernels: arrays (B, H, W, C), weights (out, H, W, in)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np

from .arrays import Array, Run, ints
from .schema import Operator

_SAME, _VALID = 0, 1


def _geometry(op: Operator) -> tuple[tuple[int, int], tuple[int, int]]:
    """Strides and dilations, along H and W."""
    strides = op.options["stride_h"], op.options["stride_w"]
    dilations = op.options.get("dilation_h", 1), op.options.get("dilation_w", 1)
    if min(strides + dilations) < 1 or op.options["padding"] not in (_SAME, _VALID):
        raise ValueError("strides, dilations or padding that cannot be")
    return strides, dilations


def padding(op: Operator, narrow: int, wide: int, stride: int, reach: int) -> tuple[int, int]:
    """What is added before and after the `wide` side of a convolution along one axis, `narrow` its other side.

    `reach` is the kernel's extent. Source: TFLite's ComputePaddingWithOffset.
    """
    total = max((narrow - 1) * stride + reach - wide, 0) if op.options["padding"] == _SAME else 0
    return total // 2, total - total // 2


def _taps(weight: Array) -> Iterator[tuple[int, int, Array]]:
    """Each point of a kernel with its matrix (out, in)."""
    for row in range(weight.shape[1]):
        for column in range(weight.shape[2]):
            yield row, column, weight[:, row, column]


def _conv_2d(e: Run, op: Operator, x: Array, weight: Array, bias: Array | None = None) -> Array:
    strides, dilations = _geometry(op)
    sizes, ends, widths = [], [], []
    for size, kernel, stride, dilation in zip(x.shape[1:3], weight.shape[1:3], strides, dilations, strict=True):
        reach = dilation * (kernel - 1) + 1
        size_out = -(-size // stride) if op.options["padding"] == _SAME else (size - reach) // stride + 1
        widths.append(padding(op, size_out, size, stride, reach))
        sizes.append(max(size_out, 0))
        ends.append((size_out - 1) * stride + 1)
    shape = x.shape[0], *sizes, weight.shape[0]
    e.room(op, (size + sum(width) for size, width in zip(x.shape, ((0,), *widths, (0,)), strict=True)))
    e.room(op, shape, prod(shape) * prod(weight.shape[1:]) // 8)
    x = e.xp.pad(x, [(0, 0), *widths, (0, 0)])
    result = e.xp.zeros(shape, dtype=x.dtype)
    for row, column, matrix in _taps(weight):
        top, left = row * dilations[0], column * dilations[1]
        picked = x[:, top : top + ends[0] : strides[0], left : left + ends[1] : strides[1]]
        result = result + picked @ matrix.T
    return result if bias is None else result + bias


def _transpose_conv(e: Run, op: Operator, shape: Array, weight: Array, x: Array, bias: Array | None = None) -> Array:
    (down, across), _ = _geometry(op)
    batch, height, width, channels = e.room(op, ints(shape), x.size * prod(weight.shape[:3]) // 8)
    rows, columns = x.shape[1:3]
    if (batch, channels) != (x.shape[0], weight.shape[0]):
        raise ValueError("an output shape that does not fit")
    top, _ = padding(op, rows, height, down, weight.shape[1])
    left, _ = padding(op, columns, width, across, weight.shape[2])
    tall, wide = max(rows * down + weight.shape[1], top + height), max(columns * across + weight.shape[2], left + width)
    result = np.zeros(e.room(op, (batch, tall, wide, channels)), np.asarray(x).dtype)
    for row, column, matrix in _taps(weight):
        result[:, row : row + rows * down : down, column : column + columns * across : across] += np.asarray(
            x @ matrix.T
        )
    result = e.array(result[:, top : top + height, left : left + width])
    return result if bias is None else result + bias


CONVOLUTIONS: dict[str, Callable[..., Any]] = {"CONV_2D": _conv_2d, "TRANSPOSE_CONV": _transpose_conv}
