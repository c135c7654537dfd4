"""The decoder's activation as one CUDA kernel with the bias and the residual sum before it, and its plain twin.

Each of these alone is a pass over the largest arrays of a model, and such passes are half of a decoder's time.
"""

from __future__ import annotations

import mlx.core as mx

from . import cuda
from .elementwise import sine

_PACK = 8  # channels that a thread computes, loaded at once

# gridDim.y is the clips; whole blocks make up a clip, so that no thread needs a bound
_SOURCE = """
  struct alignas(8 * sizeof(T)) Pack { T v[8]; };
  const unsigned int width = frequency_shape[0] / 8;
  const unsigned int packs = gridDim.x * blockDim.x;
  const unsigned int index = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned int skipped = (unsigned int)x_shape[1] * width - packs;
  const unsigned int column = index % width;
  const size_t place = (size_t)blockIdx.y * packs + index;
  const Pack given = reinterpret_cast<const Pack*>(x)[place + (size_t)blockIdx.y * skipped + skipped / 2];
  // loaded whole, too: one by one they are 24 loads a thread beside the arrays' two to four
  const Pack frequencies = reinterpret_cast<const Pack*>(frequency)[column];
  const Pack magnitudes = reinterpret_cast<const Pack*>(magnitude)[column];
  Pack other;
  Pack shift;
  if (RESIDUAL) other = reinterpret_cast<const Pack*>(residual)[place];
  if (BIAS) shift = reinterpret_cast<const Pack*>(bias)[column];
  Pack sum;
  Pack result;
  #pragma unroll
  for (int i = 0; i < 8; i++) {
    float s = static_cast<float>(given.v[i]);
    if (BIAS) s += static_cast<float>(shift.v[i]);
    if (RESIDUAL) s += static_cast<float>(other.v[i]);
    sum.v[i] = static_cast<T>(s);
    s = static_cast<float>(sum.v[i]);
    const float angle = static_cast<float>(frequencies.v[i]) * s;
    const float w = sizeof(T) == 4 ? sinf(angle) : __sinf(angle);  // its error is far below a half type's rounding
    result.v[i] = static_cast<T>(s + static_cast<float>(magnitudes.v[i]) * w * w);
  }
  reinterpret_cast<Pack*>(out)[place] = result;
"""
_KEEP = "  reinterpret_cast<Pack*>(total)[place] = sum;\n"


def snake(
    x: mx.array,
    bias: mx.array | None,
    residual: mx.array | None,
    frequency: mx.array,
    magnitude: mx.array,
    keep: bool = False,
    skip: int = 0,
) -> tuple[mx.array | None, mx.array]:
    """s = x + bias + residual, and s + magnitude·sin²(frequency·s); s is None unless `keep`.

    Args:
        x: (B, L + 2·skip, C), of which `skip` frames at both ends are not heard.
        bias: (C,) or None.
        residual: (B, L, C) or None.
        frequency, magnitude: (C,).
    """
    batch, frames, channels = x.shape
    if not cuda.is_default() or channels % _PACK:
        return plain_snake(x, bias, residual, frequency, magnitude, keep, skip)
    shape = batch, frames - 2 * skip, channels
    names = ("out", "total") if keep else ("out",)
    given = {
        "x": x,
        "residual": frequency if residual is None else residual,  # a stand-in is not read
        "bias": frequency if bias is None else bias,
        "frequency": frequency,
        "magnitude": magnitude,
    }
    packs = shape[1] * channels // _PACK
    constants = {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    made = _launch(given, dict.fromkeys(names, shape), x.dtype, constants, _SOURCE + _KEEP * keep, packs)
    return (made[1] if keep else None), made[0]


def plain_snake(
    x: mx.array,
    bias: mx.array | None,
    residual: mx.array | None,
    frequency: mx.array,
    magnitude: mx.array,
    keep: bool = False,
    skip: int = 0,
) -> tuple[mx.array | None, mx.array]:
    """As `snake`, on any device."""
    total = x[:, skip : x.shape[1] - skip]
    for term in (bias, residual):
        total = total if term is None else total + term
    return (total if keep else None), total + magnitude * mx.square(sine(frequency * total))


def _launch(
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[int, ...]],
    dtype: mx.Dtype,
    constants: dict[str, bool],
    source: str,
    threads: int,
) -> list[mx.array]:
    """`threads` for each clip."""
    batch = next(iter(outputs.values()))[0]
    block = min(threads & -threads, 256)  # the largest power of two that divides them
    return cuda.build("snake", tuple(inputs), tuple(outputs), source)(
        inputs=list(inputs.values()),
        template=[("T", dtype), *constants.items()],
        grid=(threads, batch, 1),
        threadgroup=(block, 1, 1),
        output_shapes=list(outputs.values()),
        output_dtypes=[dtype] * len(outputs),
    )
