"""The diffusion transformer of stable-audio-tools (`dit.py` and `transformer.py` there), and its config."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import NamedTuple
from weakref import proxy

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import cuda_dit
from .dense import add_dense, is_plain
from .elementwise import silu
from .schema import Section, check

OBJECTIVES = ("v", "rectified_flow", "rf_denoiser")
_TIMESTEP_FEATURES = 256
_QK_NORM_EPS = 1e-6
# settings of the reference that no released model changes
_FIXED = {
    "transformer_type": "continuous_transformer",
    "global_cond_type": "prepend",
    "timestep_cond_type": "global",
    "patch_size": 1,
    "input_concat_dim": 0,
    "prepend_cond_dim": 0,
    "final_cross_attn_ix": -1,
    "causal": False,
    "rotary_pos_emb": True,
    "conformer": False,
    "use_sinusoidal_emb": False,
    "use_abs_pos_emb": False,
    "num_memory_tokens": 0,
    "sliding_window": None,
    "remove_norms": False,
    "add_rope": False,
    "layer_scale": False,
}
_FIXED_ATTENTION = {"differential": False, "feat_scale": False}
_FIXED_FF = {"no_bias": False, "glu": True, "use_conv": False}


@dataclass(frozen=True)
class DiTConfig:
    """`cond_embed_dim` is the width of the cross-attention tokens after projection; it sets the key/value heads.

    A `global_cond_dim` of 0 means that the time alone is the global token.
    """

    io_channels: int
    embed_dim: int
    depth: int
    num_heads: int
    cond_token_dim: int
    cond_embed_dim: int
    global_cond_dim: int
    ff_dim: int
    norm_eps: float
    qk_norm: bool
    objective: str
    shifts_distribution: bool

    @classmethod
    def read(cls, diffusion: Section) -> DiTConfig:
        """Read `model.diffusion`. Raises ConfigError."""
        diffusion.one_of("type", ("dit",))
        objective = diffusion.one_of("diffusion_objective", OBJECTIVES, "v")
        shift = diffusion.take("distribution_shift_options", dict, None)
        for key in ("input_concat_ids", "prepend_cond_ids"):
            diffusion.one_of(key, ([],), [])
        diffusion.without_effect("cross_attention_cond_ids", "global_cond_ids")
        section = diffusion.section("config")
        diffusion.done()

        attention, ff, norm = (section.section(key, {}) for key in ("attn_kwargs", "ff_kwargs", "norm_kwargs"))
        for inner, fixed in ((section, _FIXED), (attention, _FIXED_ATTENTION), (ff, _FIXED_FF)):
            for key, value in fixed.items():
                inner.one_of(key, (value,), value)
        embed_dim, num_heads = section.size("embed_dim", 768), section.size("num_heads", 8)
        cond_token_dim, global_cond_dim = section.size("cond_token_dim"), section.size("global_cond_dim", least=0)
        projected = section.take("project_cond_tokens", bool, True)
        if not section.take("project_global_cond", bool, True):
            where = f"{section.where}: an unprojected global_cond_dim"
            check(global_cond_dim == embed_dim, f"{where} must equal embed_dim {embed_dim}, found {global_cond_dim}")
        config = cls(
            io_channels=section.size("io_channels", 32),
            embed_dim=embed_dim,
            depth=section.size("depth", 12, most=1000),
            num_heads=num_heads,
            cond_token_dim=cond_token_dim,
            cond_embed_dim=embed_dim if projected else cond_token_dim,
            global_cond_dim=global_cond_dim,
            ff_dim=int(embed_dim * ff.take("mult", float, 4.0)),
            norm_eps=norm.take("eps", float, 1e-5),
            qk_norm=attention.one_of("qk_norm", ("none", "ln"), "none") == "ln",
            objective=objective,
            shifts_distribution=shift is not None,
        )
        # initial values, lengths of tables that are off, and which norm parameters were trained
        section.without_effect("zero_init_branch_outputs", "abs_pos_emb_max_length", "timestep_embed_dim")
        ff.without_effect("zero_init_output", "conv_kernel_size")
        norm.without_effect("bias", "fix_scale", "force_fp32")
        for inner in (section, attention, ff, norm):
            inner.done()
        config._check(section.where)
        return config

    def _check(self, where: str) -> None:
        fits = self.embed_dim % self.num_heads == 0
        check(fits, f"{where}: embed_dim {self.embed_dim} does not give {self.num_heads} heads")
        head, width = self.head_dim, self.cond_embed_dim
        fits = head >= 32 and self.rotary_dim % 2 == 0
        check(fits, f"{where}: heads of {head} cannot be rotated; they must be 32 to 64 or a multiple of 4")
        fits = width % head == 0 and self.num_heads % (width // head) == 0
        check(fits, f"{where}: tokens of {width} give no key/value heads of {head} that divide {self.num_heads} heads")
        check(1 <= self.ff_dim < 2**26, f"{where}.ff_kwargs.mult gives a width of {self.ff_dim}")
        check(self.norm_eps > 0, f"{where}.norm_kwargs.eps must be above 0")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.cond_embed_dim // self.head_dim

    @property
    def rotary_dim(self) -> int:
        return max(self.head_dim // 2, 32)


class Attention(nn.Module):
    """What self- and cross-attention share: heads, their optional norm, and the way out."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(config.head_dim, _QK_NORM_EPS)
            self.k_norm = nn.LayerNorm(config.head_dim, _QK_NORM_EPS)
        self.qk_norm = config.qk_norm
        self.to_out = nn.Linear(config.embed_dim, config.embed_dim, bias=False)

    def split_heads(self, x: mx.array, batch: int) -> mx.array:
        """(B·T, heads · head_dim) → (B, T, heads, head_dim)"""
        return x.reshape(batch, len(x) // batch, -1, self.head_dim)

    def attend(self, residual: mx.array, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """residual (B·T, E) and heads (B, heads, T, head_dim) → (B·T, E).

        Fewer key/value heads than query heads are shared by neighbours.
        """
        states = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return add_dense(residual, self.to_out, states.transpose(0, 2, 1, 3).reshape(residual.shape))


def _kernel_norm(norm: nn.LayerNorm) -> cuda_dit.Norm:
    return cuda_dit.Norm(norm.weight, norm.bias, norm.eps)


def _periods(rotary_dim: int) -> np.ndarray:
    """As float32 powers, as the reference takes them; from a base, angles at position 1000 are 2e-4 apart."""
    return np.float32(10000) ** (np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim))


@cache
def _rotation(length: int, rotary_dim: int) -> cuda_dit.Rotation:
    angles = np.arange(length, dtype=np.float32)[:, None] * (1 / _periods(rotary_dim))
    return cuda_dit.Rotation(mx.array(np.cos(angles)), mx.array(np.sin(angles)))


class SelfAttention(Attention):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.rotary_dim = config.rotary_dim
        self._periods = mx.array(_periods(config.rotary_dim))
        self.to_qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=False)

    def __call__(self, residual: mx.array, x: mx.array, batch: int) -> mx.array:
        q, k, v = mx.split(self.split_heads(self.to_qkv(x), batch).transpose(0, 2, 1, 3), 3, axis=1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.attend(residual, self.rotate(q), self.rotate(k), v)

    def states_by_kernels(self, x: mx.array, batch: int) -> mx.array:
        """x (B·T, E) → the heads' states (B·T, E)"""
        qkv, (rows, width) = self.to_qkv(x), x.shape
        heads, starts, length = width // self.head_dim, (width, 2 * width), rows // batch
        qk = cuda_dit.prepare_heads(qkv, self.head_dim, heads, length, self.kernel_norms(), self.rotation(length))
        qk, v = (part.reshape(batch, length, -1) for part in (qk, qkv))
        return cuda_dit.attention(qk, qk, v, self.head_dim, heads, heads, starts)

    def kernel_norms(self) -> tuple[cuda_dit.Norm | None, cuda_dit.Norm | None]:
        return (_kernel_norm(self.q_norm), _kernel_norm(self.k_norm)) if self.qk_norm else (None, None)

    def rotation(self, length: int) -> cuda_dit.Rotation:
        return _rotation(length, self.rotary_dim)

    def rotate(self, x: mx.array) -> mx.array:
        return mx.fast.rope(x, self.rotary_dim, traditional=False, base=None, scale=1.0, offset=0, freqs=self._periods)


class CrossAttention(Attention):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.to_q = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        self.to_kv = nn.Linear(config.cond_embed_dim, 2 * config.cond_embed_dim, bias=False)

    def keys_values(self, context: mx.array, batch: int, for_kernels: bool) -> tuple[mx.array, mx.array]:
        k, v = mx.split(self.split_heads(self.to_kv(context), batch).transpose(0, 2, 1, 3), 2, axis=1)
        k = self.k_norm(k) if self.qk_norm else k
        if for_kernels:  # heads of a token side by side
            k, v = (mx.contiguous(part.transpose(0, 2, 1, 3).flatten(2)) for part in (k, v))
        return k, v

    def __call__(self, residual: mx.array, x: mx.array, keys_values: tuple[mx.array, mx.array]) -> mx.array:
        # normed before the heads change places: a norm wants its rows in order
        q = self.split_heads(self.to_q(x), len(keys_values[0]))
        q = self.q_norm(q) if self.qk_norm else q
        return self.attend(residual, q.transpose(0, 2, 1, 3), *keys_values)

    def states_by_kernel(self, x: mx.array, keys_values: tuple[mx.array, mx.array]) -> mx.array:
        """x (B·T, E) → the heads' states (B·T, E)"""
        q = self.to_q(x).reshape(len(keys_values[0]), -1, x.shape[1])
        heads, kv_heads = (part.shape[2] // self.head_dim for part in (q, keys_values[0]))
        return cuda_dit.attention(q, *keys_values, self.head_dim, heads, kv_heads, norm=self.kernel_norm())

    def kernel_norm(self) -> cuda_dit.Norm | None:
        return _kernel_norm(self.q_norm) if self.qk_norm else None


class FeedForward(nn.Module):
    """SwiGLU: the value comes first, the gate second."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.compiles = False
        self.proj_in = nn.Linear(config.embed_dim, 2 * config.ff_dim)
        self.proj_out = nn.Linear(config.ff_dim, config.embed_dim)

    def __call__(self, residual: mx.array, x: mx.array) -> mx.array:
        return residual + self.end(self.proj_in(x))

    def end(self, gated: mx.array) -> mx.array:
        if self.compiles and cuda_dit.usable(gated.dtype) and gated.shape[1] % 16 == 0:
            return self.proj_out(cuda_dit.swiglu(gated))
        value, gate = mx.split(gated, 2, axis=-1)
        return self.proj_out(value * silu(gate))


class Block(nn.Module):
    """(B·T, E) → (B·T, E), all clips in one: with three axes each product takes two operations more."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(config.embed_dim, config.norm_eps)
        self.self_attention = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.embed_dim, config.norm_eps)
        self.cross_attention = CrossAttention(config)
        self.ff_norm = nn.LayerNorm(config.embed_dim, config.norm_eps)
        self.ff = FeedForward(config)

    def __call__(self, x: mx.array, keys_values: tuple[mx.array, mx.array]) -> mx.array:
        x = self.self_attention(x, self.self_norm(x), len(keys_values[0]))
        x = self.cross_attention(x, self.cross_norm(x), keys_values)
        return self.ff(x, self.ff_norm(x))

    def fits_kernels(self, dtype: mx.Dtype) -> bool:
        """Whether those of cuda_dit.py can do it for rows of this dtype; not where attention is quantised."""
        own, cross = self.self_attention, self.cross_attention
        fits = cuda_dit.usable(dtype) and cuda_dit.attends(own.head_dim)
        return fits and all(layer.weight.dtype == dtype for layer in (own.to_out, cross.to_out))

    def fits_one_kernel(self) -> bool:
        """Whether `cuda_dit.block` can do what the kernels can."""
        own, cross, ff = self.self_attention, self.cross_attention, self.ff
        plain = is_plain(own.to_qkv, own.to_out, cross.to_q, cross.to_out) and isinstance(ff.proj_out, nn.Linear)
        return plain and ff.proj_out.weight.shape[1] % 64 == 0

    def attend_by_kernels(
        self,
        x: mx.array,
        before: tuple[FeedForward, mx.array] | None,
        keys_values: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array]:
        """As `attend_by_one_kernel`, with the library's products."""
        own, cross = self.self_attention, self.cross_attention
        if before is None:
            normed = self.self_norm(x)
        else:
            ff, gated = before
            x, normed = cuda_dit.add_norm(x, ff.end(gated), _kernel_norm(self.self_norm))
        added = own.to_out(own.states_by_kernels(normed, len(keys_values[0])))
        x, normed = cuda_dit.add_norm(x, added, _kernel_norm(self.cross_norm))
        added = cross.to_out(cross.states_by_kernel(normed, keys_values))
        return cuda_dit.add_norm(x, added, _kernel_norm(self.ff_norm))

    def attend_by_one_kernel(
        self,
        x: mx.array,
        before: tuple[FeedForward, mx.array] | None,
        keys_values: tuple[mx.array, mx.array],
        arrivals: mx.array,
    ) -> tuple[mx.array, mx.array]:
        """What `cuda_dit.block` returns; `before` is the feed-forward before, and its first product."""
        own, cross = self.self_attention, self.cross_attention
        layers = {"to_qkv": own.to_qkv, "self_out": own.to_out, "to_q": cross.to_q, "cross_out": cross.to_out}
        weights = {name: layer.weight for name, layer in layers.items()}
        gated = None
        if before is not None:
            ff, gated = before
            weights |= {"ff_out": ff.proj_out.weight, "ff_bias": ff.proj_out.bias}
        norms = {"SELF_NORM": self.self_norm, "CROSS_NORM": self.cross_norm, "FF_NORM": self.ff_norm}
        norms = {name: _kernel_norm(norm) for name, norm in norms.items()}
        norms |= dict(zip(("Q_NORM", "K_NORM"), own.kernel_norms(), strict=True), CROSS_Q_NORM=cross.kernel_norm())
        rotation = own.rotation(len(x) // len(keys_values[0]))
        return cuda_dit.block(x, gated, weights, norms, rotation, keys_values, own.head_dim, arrivals)


class Embedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, input_dim: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(input_dim, dim, bias=bias)
        self.second = nn.Linear(dim, dim, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.second(silu(self.first(x)))


class Prepared(NamedTuple):
    """What a clip's conditioning gives to every step: keys and values of each block, and the global token."""

    keys_values: list[tuple[mx.array, mx.array]]
    global_embed: mx.array


class DiT(nn.Module):
    """Velocity of latents, given the time, cross-attention tokens and a global vector."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.compiles = False
        self.timestep_frequencies = mx.zeros((_TIMESTEP_FEATURES // 2,))
        self.to_timestep_embed = Embedder(_TIMESTEP_FEATURES, config.embed_dim, bias=True)
        self.to_cond_embed = Embedder(config.cond_token_dim, config.cond_embed_dim, bias=False)
        if config.global_cond_dim:
            self.to_global_embed = Embedder(config.global_cond_dim, config.embed_dim, bias=False)
        self.preprocess = nn.Linear(config.io_channels, config.io_channels, bias=False)
        self.project_in = nn.Linear(config.io_channels, config.embed_dim, bias=False)
        self.blocks = [Block(config) for _ in range(config.depth)]
        self.project_out = nn.Linear(config.embed_dim, config.io_channels, bias=False)
        self.postprocess = nn.Linear(config.io_channels, config.io_channels, bias=False)

    def compile(self) -> None:
        """Has a GPU's `velocity` compiled from now on."""
        for module in (self, *(block.ff for block in self.blocks)):
            module.compiles = True

    def __call__(self, latents: mx.array, t: mx.array, cross_attention: mx.array, global_cond: mx.array) -> mx.array:
        """Latents (B, T, C), t (B,), tokens (B, N, D), global vector (B, G) → velocity (B, T, C)."""
        return self.velocity(latents, t, self.prepare(cross_attention, global_cond))

    def prepare(self, cross_attention: mx.array, global_cond: mx.array) -> Prepared:
        """Everything that depends on the conditioning alone, to be computed once a clip.

        The tokens' mask plays no part: the reference attends to the zero rows of padding too.
        """
        dtype, batch = self.project_in.weight.dtype, len(cross_attention)
        context = self.to_cond_embed(cross_attention.astype(dtype).flatten(0, 1))
        by_kernels = self.compiles and all(block.fits_kernels(dtype) for block in self.blocks)
        keys_values = [block.cross_attention.keys_values(context, batch, by_kernels) for block in self.blocks]
        if not self.config.global_cond_dim:
            return Prepared(keys_values, mx.zeros((batch, self.config.embed_dim), dtype))
        return Prepared(keys_values, self.to_global_embed(global_cond.astype(dtype)))

    def velocity(self, latents: mx.array, t: mx.array, prepared: Prepared) -> mx.array:
        """As `__call__`, for conditioning that was prepared; in the dtype of the latents.

        After `compile`, on a GPU, compiled at the first call of each shape, with the weights as they are then.
        """
        compiled = self.compiles and mx.default_device() == mx.gpu
        function = self._compiled if compiled else self._velocity
        return function(latents, t, *prepared)

    @cached_property
    def _compiled(self) -> Callable[..., mx.array]:
        return mx.compile(partial(DiT._velocity, proxy(self)))  # a cycle would outlive the model

    def _velocity(
        self,
        latents: mx.array,
        t: mx.array,
        keys_values: list[tuple[mx.array, mx.array]],
        global_embed: mx.array,
    ) -> mx.array:
        batch = len(latents)
        x = latents.astype(self.project_in.weight.dtype).flatten(0, 1)
        x = self.project_in(add_dense(x, self.preprocess, x)).reshape(batch, -1, self.config.embed_dim)
        token = global_embed + self.embed_time(t)
        x = mx.concatenate([token[:, None, :], x], axis=1).flatten(0, 1)
        if keys_values[0][0].ndim == 3:
            x = self._by_kernels(x, t, keys_values)
        else:
            for block, own in zip(self.blocks, keys_values, strict=True):
                x = block(x, own)
        x = self.project_out(x.reshape(batch, -1, self.config.embed_dim)[:, 1:].flatten(0, 1))
        return add_dense(x, self.postprocess, x).reshape(latents.shape).astype(latents.dtype)

    def _by_kernels(self, x: mx.array, t: mx.array, keys_values: list[tuple[mx.array, mx.array]]) -> mx.array:
        """All blocks; after the feed-forward's first product, the next block goes on with the rest of it."""
        one = cuda_dit.prefers_block(x) and all(block.fits_one_kernel() for block in self.blocks)
        arrivals = [cuda_dit.zero_arrivals(t)] if one else []
        before = None
        for block, own in zip(self.blocks, keys_values, strict=True):
            attend = block.attend_by_one_kernel if one else block.attend_by_kernels
            x, normed = attend(x, before, own, *arrivals)
            before = block.ff, block.ff.proj_in(normed)
        ff, gated = before
        return x + ff.end(gated)

    def embed_time(self, t: mx.array) -> mx.array:
        """t (B,) → (B, E). Cosine first, then sine, and no raw t, unlike the seconds' embedding."""
        angles = (2 * math.pi * t.astype(mx.float32))[:, None] * self.timestep_frequencies
        features = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)
        return self.to_timestep_embed(features.astype(self.project_in.weight.dtype))
