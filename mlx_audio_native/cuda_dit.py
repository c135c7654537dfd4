"""The DiT's blocks in half precision on the tensor cores of an NVIDIA GPU.

MLX hands each operation to the GPU at a price of 3 to 15 µs, so that at batch 1 a step of many small operations waits
for the host. Hence one kernel from a block's feed-forward to the next block's, its blocks of threads waiting for each
other between the parts. `Block` of dit.py is the plain form of the same formulas, for every other device and dtype.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from . import cuda

_FEW_ROWS = 576  # beyond which the library's products are the faster ones; two clips of stable-audio-open-small
_HEADER = Path(__file__).with_suffix(".cuh")

_MEMORY = "  extern __shared__ __align__(128) unsigned char memory[];\n"
_HEADS = """
  prepare_heads<T, D>(x, x_shape[1], out, ALL * D, x_shape[0], LENGTH, HEADS, ALL, Q_NORM, K_NORM, cosine, sine);
"""
_ATTENTION = """
  attend<T, D, 4, 1, T>({READY ? q : nullptr, q_shape[2]}, {q, q_shape[2]}, Q_NORM, {k + K_START, k_shape[2]},
                        {v + V_START, v_shape[2]}, out, q_shape[0], q_shape[1], k_shape[1], HEADS, KV_HEADS, SCALE,
                        memory);
"""
_ADD_NORM = """
  norm_rows<T, C, 1>(x, added, nullptr, NORM, sum, normed, x_shape[0]);
"""
_SWIGLU = """
  gate_rows(x, out, x_shape[0], x_shape[1] / 2);
"""

# From the gated product of the feed-forward before, if there is one, to the norm before the next. `scratch` holds what
# goes into a product, what came out of one, and its sums.
_BLOCK = """
  constexpr int E = HEADS * D;
  const int rows = x_shape[0];
  const int clips = k_shape[0];
  const int length = rows / clips;
  T* before = scratch;
  T* after = before + (long long)rows * E;
  float* sums = reinterpret_cast<float*>(after + (long long)rows * max(3 * E, FF));
  FEED_FORWARD
  product(before, to_qkv, sums, rows, E, 3 * E, 1, memory, arrivals);
  wait_for_all(arrivals);
  prepare_heads<T, D>(sums, 3 * E, after, 3 * E, rows, length, HEADS, 3 * HEADS, Q_NORM, K_NORM, cosine, sine);
  wait_for_all(arrivals);
  attend<T, D, 2, PARTS, float>({after, 3 * E}, {}, {}, {after + E, 3 * E}, {after + 2 * E, 3 * E}, before, clips,
                                length, length, HEADS, HEADS, SCALE, memory);
  product(before, self_out, sums, rows, E, E, PARTS, memory, arrivals);
  wait_for_all(arrivals);
  norm_rows<T, E, PARTS>(out, sums, nullptr, CROSS_NORM, out, before, rows);
  product(before, to_q, sums, rows, E, E, PARTS, memory, arrivals);
  wait_for_all(arrivals);
  attend<T, D, 2, PARTS, float>({}, {sums, E}, CROSS_Q_NORM, {k, k_shape[2]}, {v, k_shape[2]}, before, clips,
                                length, k_shape[1], HEADS, KV_HEADS, SCALE, memory);
  product(before, cross_out, sums, rows, E, E, PARTS, memory, arrivals);
  wait_for_all(arrivals);
  norm_rows<T, E, PARTS>(out, sums, nullptr, FF_NORM, out, normed, rows);
"""
_NO_FEED_FORWARD = "norm_rows<T, E, 0>(x, sums, nullptr, SELF_NORM, out, before, rows);"
_FEED_FORWARD = """
  gate_rows(gated, after, rows, FF);
  product(after, ff_out, sums, rows, FF, E, PARTS, memory, arrivals);
  wait_for_all(arrivals);
  norm_rows<T, E, PARTS>(x, sums, ff_bias, SELF_NORM, out, before, rows);
"""


class Norm(NamedTuple):
    """A LayerNorm's gain and shift, and its epsilon."""

    gain: mx.array
    shift: mx.array
    eps: float


class Rotation(NamedTuple):
    """Cosines and sines (at least the length, head_dim / 4), float32: half of a head's dimensions are rotated."""

    cosine: mx.array
    sine: mx.array


def usable(dtype: mx.Dtype) -> bool:
    """Whether the kernels run here: in half precision, from compute capability 8.0 on."""
    return dtype in (mx.float16, mx.bfloat16) and cuda.is_default() and cuda.capability() >= 8


def attends(head_dim: int) -> bool:
    """Whether attention has such heads."""
    return head_dim in (64, 128)


def prefers_block(x: mx.array) -> bool:
    """Whether `block` is the faster way: with few rows, to hand over operations costs more than to run them."""
    return len(x) <= _FEW_ROWS and cuda.processors() > 0


def zero_arrivals(t: mx.array) -> mx.array:
    """What `block` counts with, for one step: zeros in memory of their own, which a constant would not have."""
    t = mx.broadcast_to(t, (32, len(t)))  # up to 8 bytes would lie in memory of the host
    return (t < t).astype(mx.uint32)


def _spell(source: str, norms: dict[str, Norm | None]) -> tuple[str, dict[str, mx.array]]:
    """A source with its norms in it, and the inputs that they are."""
    inputs = {}
    for name, norm in norms.items():
        text = "{}"
        if norm:
            gain, shift = f"{name.lower()}_gain", f"{name.lower()}_shift"
            inputs |= {gain: norm.gain, shift: norm.shift}
            text = f"Norm<T>{{{gain}, {shift}, {norm.eps:.9e}f}}"
        source = re.sub(rf"\b{name}\b", text, source)
    return source, inputs


def _spell_scale(source: str, head_dim: int) -> str:
    return source.replace("SCALE", f"{head_dim**-0.5 * math.log2(math.e):.9e}f")


def prepare_heads(
    x: mx.array,
    head_dim: int,
    heads: int,
    length: int,
    norms: tuple[Norm | None, Norm | None],
    rotation: Rotation,
) -> mx.array:
    """Of x (B·length, …) the queries it begins with, and as many keys: normed, each by its own, and rotated.

    (B·length, 2 · heads · head_dim); a norm that is None is left out.
    """
    source, inputs = _spell(_HEADS, dict(zip(("Q_NORM", "K_NORM"), norms, strict=True)))
    inputs = {"x": x} | inputs | rotation._asdict()
    rows, count = len(x), 2 * heads
    constants = {"D": head_dim, "HEADS": heads, "ALL": count, "LENGTH": length}
    outputs = {"out": (rows, count * head_dim)}
    return _launch("prepare_heads", source, inputs, outputs, constants, -(-rows * count // 32), 0)[0]


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    head_dim: int,
    heads: int,
    kv_heads: int,
    starts: tuple[int, int] = (0, 0),
    norm: Norm | None = None,
) -> mx.array:
    """q (B, L, …), its heads first in a row, k and v (B, M, …), theirs from `starts` on → (B·L, heads · head_dim).

    With a norm, queries are normed on the way.
    """
    batch, length = q.shape[:2]
    constants = {"D": head_dim, "HEADS": heads, "KV_HEADS": kv_heads, "K_START": starts[0], "V_START": starts[1]}
    constants["READY"] = int(norm is None)
    source, inputs = _spell(_spell_scale(_ATTENTION, head_dim), {"Q_NORM": norm})
    outputs = {"out": (batch * length, heads * head_dim)}
    blocks, memory = -(-length // 64) * heads * batch, _attention_memory(head_dim, 64)
    # fewer warps than in `block`: two blocks of threads on a processor hide each other's waits
    inputs = {"q": q, "k": k, "v": v} | inputs
    return _launch("attention", source, inputs, outputs, constants, blocks, memory, warps=4)[0]


def add_norm(x: mx.array, added: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
    """The sum of two (rows, C), and its norm; C must be a multiple of 8."""
    rows, width = x.shape
    source, inputs = _spell(_ADD_NORM, {"NORM": norm})
    inputs, outputs = {"x": x, "added": added} | inputs, {"sum": x.shape, "normed": x.shape}
    return tuple(_launch("add_norm", source, inputs, outputs, {"C": width}, -(-rows // 8), 0))


def block(
    x: mx.array,
    gated: mx.array | None,
    weights: dict[str, mx.array],
    norms: dict[str, Norm | None],
    rotation: Rotation,
    keys_values: tuple[mx.array, mx.array],
    head_dim: int,
    arrivals: mx.array,
) -> tuple[mx.array, mx.array]:
    """The end of the feed-forward before a block, and the block up to its own: what `Block` adds up, and its norm.

    Args:
        x: (B·L, E), with E a multiple of 64.
        gated: what the feed-forward before comes to before its SwiGLU, (B·L, 2·F), F a multiple of 64; or None.
        weights: to_qkv (3·E, E); self_out, to_q and cross_out (E, E); with `gated`, ff_out (E, F) and ff_bias (E,).
        norms: SELF_NORM, CROSS_NORM and FF_NORM of E numbers; Q_NORM, K_NORM and CROSS_Q_NORM of a head's, or None.
        rotation: of the clip's positions.
        keys_values: cross-attention's, (B, M, kv_heads · head_dim) each, the keys normed.
        head_dim: 64 or 128.
        arrivals: of `zero_arrivals`, for all blocks of a step.

    All processors of the GPU must be free for it in the end: two that run at the same time may each hold some that the
    other waits for, and end in an error after a while. Steps that depend on each other never do.
    """
    source = _BLOCK.replace("FEED_FORWARD", _NO_FEED_FORWARD if gated is None else _FEED_FORWARD)
    source, inputs = _spell(_spell_scale(source, head_dim), norms)
    rows, width = x.shape
    inputs = {"x": x} | weights | dict(zip("kv", keys_values, strict=True)) | inputs | rotation._asdict()
    inputs |= {"arrivals": arrivals} | ({} if gated is None else {"gated": gated})
    # such that about all processors have a tile
    parts = max(1, min(cuda.processors() // (-(-rows // 64) * -(-width // 128)), width // 64))
    constants = {"D": head_dim, "HEADS": width // head_dim, "KV_HEADS": keys_values[0].shape[2] // head_dim}
    constants |= {"FF": 0 if gated is None else gated.shape[1] // 2, "PARTS": parts}
    scratch = rows, width + max(3 * width, constants["FF"]) + 2 * max(3, parts) * width
    outputs = {"out": x.shape, "normed": x.shape, "scratch": scratch}
    memory = max(4 * (64 + 128) * 64 * x.itemsize, _attention_memory(head_dim, 32))
    return tuple(_launch("block", source, inputs, outputs, constants, cuda.processors(), memory)[:2])


def swiglu(x: mx.array) -> mx.array:
    """(rows, 2·F) → (rows, F): the first half times SiLU of the second. F must be a multiple of 8."""
    shape = len(x), x.shape[1] // 2
    return _launch("swiglu", _SWIGLU, {"x": x}, {"out": shape}, {}, -(-math.prod(shape) // (8 * 256)), 0)[0]


def _attention_memory(head_dim: int, queries: int) -> int:
    return (queries + 4 * 64) * head_dim * 2


def _launch(
    name: str,
    source: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[int, ...]],
    constants: dict[str, int],
    blocks: int,
    shared_memory: int,
    warps: int = 8,
) -> list[mx.array]:
    """The outputs, in the dtype of the first input; `warps` are a block's."""
    dtype = next(iter(inputs.values())).dtype
    header = f"constexpr int WARPS = {warps};\n" + _header()
    return cuda.build(name, tuple(inputs), tuple(outputs), _MEMORY + source, header, shared_memory)(
        inputs=list(inputs.values()),
        template=[("T", dtype), *constants.items()],
        grid=(blocks * warps * 32, 1, 1),
        threadgroup=(warps * 32, 1, 1),
        output_shapes=list(outputs.values()),
        output_dtypes=[dtype] * len(outputs),
    )


@cache
def _header() -> str:
    return _HEADER.read_text()
