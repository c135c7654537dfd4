"""The decoder for an NVIDIA GPU: kernels of our own, products and convolutions, and no pass over arrays between them.

Each pass over the largest arrays costs as much as a product of theirs, so none is only for a bias, a sum, zeros at the
ends or another order of frames: biases wait for the next snake, which also puts its frames where they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import mlx.core as mx

from . import cuda

if TYPE_CHECKING:
    from .oobleck import Decoder, OobleckConfig, Snake

_PACK = 8  # channels that a thread computes, loaded at once
_ROWS = 4  # such packs of a thread, which keeps as many loads under way
_THREADS = 256
_BLOCK = 8  # frames that the last convolution computes at once: of 2 channels alone it is 3 times as slow

# a thread for a pack of some rows of the result, blockIdx.y is the signal that they lie in
_SOURCE = """
  struct alignas(8 * sizeof(T)) Pack { T v[8]; };
  struct alignas(8 * sizeof(T)) Bits { unsigned int v[2 * sizeof(T)]; };  // of a pack, loaded at once
  const unsigned int rows = sizes[0], frames = sizes[1], skip = sizes[2], from = sizes[3], to = sizes[4];
  const unsigned int pairs = sizes[5];
  const unsigned int width = frequency_shape[0] / 8;
  const unsigned int index = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned int row = index / width * ROWS;
  const unsigned int column = index % width;
  if (row >= rows) return;
  // each frame is in two pairs, that is twice in a row; before the first it wraps to a number past all
  const unsigned int phase = blockIdx.y % to + pairs;
  auto frame_of = [&](unsigned int r) { return ((r * to + phase) >> pairs) - pairs; };
  const size_t clip = blockIdx.y / to;
  const Bits* signals = reinterpret_cast<const Bits*>(x) + (clip * from * x_shape[1] + skip) * width + column;
  Bits given[ROWS];
  #pragma unroll
  for (int r = 0; r < ROWS; r++) {
    // also for a row without a frame: loads under a condition would wait for each other
    const unsigned int frame = min(frame_of(row + r), frames - 1);
    given[r] = signals[(frame % from * x_shape[1] + frame / from) * width];
  }
  const Pack shifts = reinterpret_cast<const Pack*>(bias)[column];
  const Pack frequencies = reinterpret_cast<const Pack*>(frequency)[column];
  const Pack magnitudes = reinterpret_cast<const Pack*>(magnitude)[column];
  #pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const Pack pack = reinterpret_cast<const Pack&>(given[r]);
    const bool heard = frame_of(row + r) < frames;
    Pack made;
    #pragma unroll
    for (int i = 0; i < 8; i++) {
      const float s = static_cast<float>(pack.v[i]) + static_cast<float>(shifts.v[i]);
      const float angle = static_cast<float>(frequencies.v[i]) * s;
      const float w = sizeof(T) == 4 ? sinf(angle) : __sinf(angle);  // its error is far below a half type's rounding
      made.v[i] = static_cast<T>(heard ? s + static_cast<float>(magnitudes.v[i]) * w * w : 0.0f);
    }
    const size_t place = (size_t)blockIdx.y * rows + row + r;
    if (row + r < rows) reinterpret_cast<Pack*>(out)[place * width + column] = made;
  }
"""


def usable(config: OobleckConfig) -> bool:
    """Whether arrays are computed on an NVIDIA GPU, and the kernel can do it."""
    return cuda.is_default() and config.use_snake and all(width % _PACK == 0 for width in config.widths)


def pieces(decoder: Decoder) -> Iterator[Callable[..., tuple[mx.array, ...]]]:
    """As `decoder.pieces`, an operation or two each; of the weights as they are now."""
    first, *stages, last_snake, last, final = decoder.layers
    yield partial(_convolved, first.weight)
    bias = first.bias
    for stage in stages:
        before, up, *units = stage.layers
        yield partial(_alone, _parameters(before, bias), pairs=True)
        yield partial(_upsampled, up.weight, len(up.bias))
        bias, skip = up.bias, up.padding
        for unit in units:
            outer, dilated, inner, dense = unit.layers
            yield partial(_entered, _parameters(outer, bias), skip, dilated.dilation)
            yield partial(_convolved, dilated.weight)
            yield partial(_activated, _parameters(inner, dilated.bias), dilated.dilation)
            yield partial(_summed, dense.weight)
            # what goes on is still without them
            bias, skip = bias + dense.bias, 0
    yield partial(_alone, _parameters(last_snake, bias))
    yield partial(_ended, last.weight, in_blocks(last.weight), final)


def _parameters(layer: Snake, bias: mx.array) -> dict[str, mx.array]:
    return {"bias": bias, "frequency": layer.frequency, "magnitude": layer.magnitude}


def _convolved(weight: mx.array, x: mx.array, *kept: mx.array) -> tuple[mx.array, ...]:
    """Without bias, and of signals that need no dilation."""
    return mx.conv1d(x, weight, padding=weight.shape[1] // 2), *kept


def _alone(parameters: dict[str, mx.array], y: mx.array, pairs: bool = False) -> tuple[mx.array]:
    return (snake(y, **parameters, frames=y.shape[1], pairs=pairs),)


def _upsampled(weight: mx.array, channels: int, pairs: mx.array) -> tuple[mx.array]:
    """With too many frames at both ends."""
    y = pairs @ weight.reshape(len(weight), -1).T
    return (y.reshape(len(y), -1, channels),)


def _entered(parameters: dict[str, mx.array], skip: int, dilation: int, y: mx.array) -> tuple[mx.array, mx.array]:
    kept = y[:, skip : y.shape[1] - skip]
    return snake(y, **parameters, frames=kept.shape[1], to=dilation), kept


def _activated(parameters: dict[str, mx.array], dilation: int, y: mx.array, kept: mx.array) -> tuple[mx.array, ...]:
    return snake(y, **parameters, frames=kept.shape[1], start=dilation), kept


def _summed(weight: mx.array, x: mx.array, kept: mx.array) -> tuple[mx.array]:
    # by a weight of three axes, since of two MLX would copy a `kept` that is not contiguous
    return (mx.addmm(kept, x, weight.transpose(1, 2, 0)),)


def _ended(weight: mx.array, blocked: mx.array, final: Callable[[mx.array], mx.array], x: mx.array) -> tuple[mx.array]:
    batch, frames, channels = x.shape
    if frames % _BLOCK:
        return (final(mx.conv1d(x, weight, padding=weight.shape[1] // 2)),)
    y = mx.conv1d(x.reshape(batch, frames // _BLOCK, _BLOCK * channels), blocked, padding=1)
    return (final(y.reshape(batch, frames, -1)),)


def in_blocks(weight: mx.array) -> mx.array:
    """A kernel (out, taps, in) as one of three blocks of frames: (frames · out, 3, frames · in)."""
    outputs, taps, inputs = weight.shape
    shifts = range(_BLOCK - taps // 2, 2 * _BLOCK - taps // 2)
    shifted = [mx.pad(weight, ((0, 0), (shift, 3 * _BLOCK - taps - shift), (0, 0))) for shift in shifts]
    return mx.stack(shifted).reshape(_BLOCK * outputs, 3, _BLOCK * inputs)


def snake(
    x: mx.array,
    bias: mx.array,
    frequency: mx.array,
    magnitude: mx.array,
    frames: int,
    start: int = 1,
    to: int = 1,
    pairs: bool = False,
) -> mx.array:
    """The `Snake` of x + bias, from `start` signals a clip to `to` of them.

    A clip's n signals (n, ceil(frames / n), C) are of every n-th frame each, with zeros where these are out: a dilated
    convolution of the clip is a plain one of them.

    Args:
        x: (B·start, rows, C); one signal may have more than `frames`: as many at both ends are not heard.
        bias, frequency, magnitude: (C,).
        pairs: each frame beside the one after it, zeros before the first and after the last: (B, frames + 1, 2·C).
    """
    signals, given, channels = x.shape
    batch = signals // start
    rows = 2 * (frames + 1) if pairs else -(-frames // to)
    sizes = _sizes(rows, frames, max(given - frames, 0) // 2, start, to, pairs)
    inputs = {"x": x, "bias": bias, "frequency": frequency, "magnitude": magnitude, "sizes": sizes}
    (made,) = cuda.build("snake", tuple(inputs), ("out",), _SOURCE)(
        inputs=list(inputs.values()),
        template=[("T", x.dtype), ("ROWS", _ROWS)],
        grid=(-(-rows // _ROWS) * channels // _PACK, batch * to, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(batch, frames + 1, 2 * channels) if pairs else (batch * to, rows, channels)],
        output_dtypes=[x.dtype],
    )
    return made


@lru_cache(1024)
def _sizes(*sizes: int) -> mx.array:
    """Kept, since what the host writes anew has to be moved to the GPU anew."""
    return mx.array(sizes, mx.uint32)
