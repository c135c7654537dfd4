"""The T5 encoder (Raffel et al. 2020), as Hugging Face transformers' T5EncoderModel computes it, and its config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import cuda_t5
from .dense import add_dense, is_plain
from .schema import Section, check, nearest

# d_model, d_kv, d_ff, layers, heads, gated: the encoders that the reference knows by name
_NAMED = {
    "t5-small": (512, 64, 2048, 6, 8, False),
    "t5-base": (768, 64, 3072, 12, 12, False),
    "t5-large": (1024, 64, 4096, 24, 16, False),
    "t5-3b": (1024, 128, 16384, 24, 32, False),
    "t5-11b": (1024, 128, 65536, 24, 128, False),
    "google/t5-v1_1-xl": (2048, 64, 5120, 24, 32, True),
    "google/t5-v1_1-xxl": (4096, 64, 10240, 24, 64, True),
    "google/flan-t5-small": (512, 64, 1024, 8, 6, True),
    "google/flan-t5-base": (768, 64, 2048, 12, 12, True),
    "google/flan-t5-large": (1024, 64, 2816, 24, 16, True),
    "google/flan-t5-xl": (2048, 64, 5120, 24, 32, True),
    "google/flan-t5-xxl": (4096, 64, 10240, 24, 64, True),
}
# what Hugging Face writes about training, generation, the decoder and bookkeeping
_WITHOUT_EFFECT = (
    *("architectures", "_name_or_path", "torch_dtype", "dtype", "transformers_version", "tokenizer_class"),
    *("use_cache", "output_past", "n_positions", "return_dict", "output_attentions", "output_hidden_states"),
    *("num_decoder_layers", "decoder_start_token_id", "is_encoder_decoder", "is_decoder", "tie_encoder_decoder"),
    *("dropout_rate", "classifier_dropout", "initializer_factor", "gradient_checkpointing"),
    *("task_specific_params", "tie_word_embeddings", "bos_token_id", "max_length"),
)


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder. `gated` means gated GELU in its tanh form, otherwise ReLU."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    gated: bool
    num_buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6

    @classmethod
    def named(cls, name: str) -> T5Config:
        """The sizes of a published T5. Raises ConfigError for an unknown name."""
        check(name in _NAMED, f"unknown t5_model_name {name!r:.60}{nearest(name, list(_NAMED))}")
        d_model, d_kv, d_ff, num_layers, num_heads, gated = _NAMED[name]
        return cls(32128, d_model, d_kv, d_ff, num_layers, num_heads, gated)

    def as_json(self) -> dict[str, Any]:
        """As Hugging Face writes it; what `read` takes."""
        return {
            "model_type": "t5",
            "vocab_size": self.vocab_size,
            "d_model": self.d_model,
            "d_kv": self.d_kv,
            "d_ff": self.d_ff,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "feed_forward_proj": "gated-gelu" if self.gated else "relu",
            "relative_attention_num_buckets": self.num_buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": self.epsilon,
        }

    @classmethod
    def read(cls, section: Section) -> T5Config:
        """Read a Hugging Face T5 config; its defaults are those of transformers. Raises ConfigError."""
        section.one_of("model_type", ("t5",), "t5")
        gated = section.one_of("feed_forward_proj", ("relu", "gated-gelu"), "relu") == "gated-gelu"
        activation = "gelu_new" if gated else "relu"
        for key, value in (
            ("is_gated_act", gated),
            ("dense_act_fn", activation),
            ("pad_token_id", 0),
            ("eos_token_id", 1),
        ):
            section.one_of(key, (value,), value)
        config = cls(
            vocab_size=section.size("vocab_size", 32128),
            d_model=section.size("d_model", 512),
            d_kv=section.size("d_kv", 64),
            d_ff=section.size("d_ff", 2048),
            num_layers=section.size("num_layers", 6, most=1000),
            num_heads=section.size("num_heads", 8),
            gated=gated,
            num_buckets=section.size("relative_attention_num_buckets", 32, most=2**16),
            max_distance=section.size("relative_attention_max_distance", 128),
            epsilon=section.take("layer_norm_epsilon", float, 1e-6),
        )
        section.without_effect(*_WITHOUT_EFFECT)
        section.done()
        check(config.epsilon > 0, f"{section.where}.layer_norm_epsilon must be above 0, found {config.epsilon}")
        # a quarter of the buckets holds single distances, the rest grow logarithmically up to max_distance
        fits = 4 <= config.num_buckets < 4 * config.max_distance
        check(fits, f"{section.where}: {config.num_buckets} buckets do not fit a distance of {config.max_distance}")
        return config


def gelu(x: mx.array) -> mx.array:
    """GELU in its tanh form; without the mx.compile of nn.gelu_approx, which on a CPU runs a C++ compiler first."""
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


class Attention(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.query = nn.Linear(config.d_model, inner, bias=False)
        self.key = nn.Linear(config.d_model, inner, bias=False)
        self.value = nn.Linear(config.d_model, inner, bias=False)
        self.out = nn.Linear(inner, config.d_model, bias=False)
        self._joined, self._joined_of = None, []  # underscored, so that they are no parameters
        self.compiles = False

    def __call__(self, residual: mx.array, x: mx.array, bias: mx.array) -> mx.array:
        """residual and x (B·L, D), bias (1, heads, B, L, L) → (B·L, D)"""
        batch, length = bias.shape[2:4]
        layers = self.query, self.key, self.value
        if is_plain(*layers) and mx.default_device() == mx.gpu:
            joined = x @ self._join(layers)
            if self.compiles and cuda_t5.fits(joined, length):
                return add_dense(residual, self.out, cuda_t5.attend(joined, bias))
            q, k, v = mx.split(joined.reshape(3, self.heads, batch, length, -1), 3)
        else:
            shape = 1, batch, length, self.heads, -1
            q, k, v = (layer(x).reshape(shape).transpose(0, 3, 1, 2, 4) for layer in layers)
        # T5 has no 1/sqrt(d) here: its initialisation absorbs it. CUDA has no attention in one operation that takes
        # float32 and a bias, and what MLX does instead begins with a product by the scale
        scores = mx.addmm(bias, q, k.swapaxes(-1, -2))
        states = mx.softmax(scores, axis=-1, precise=True) @ v
        return add_dense(residual, self.out, states.transpose(0, 2, 3, 1, 4).reshape(len(x), -1))

    def _join(self, layers: Sequence[nn.Linear]) -> mx.array:
        """(3·heads, D, d); the layers' weights are views of it from then on, so that it takes no memory of its own."""
        weights = [layer.weight for layer in layers]
        if self._joined is None or any(map(is_not, weights, self._joined_of)):  # other weights than before, or none yet
            joined = mx.concatenate(weights)
            self._joined_of = mx.split(joined, 3)
            self._joined = joined.reshape(3 * self.heads, -1, joined.shape[1]).swapaxes(1, 2)
            # made now, lest it be part of a compiled function and made at each call
            mx.async_eval(self._joined, self._joined_of)
            for layer, weight in zip(layers, self._joined_of, strict=True):
                layer.weight = weight
        return self._joined


class FeedForward(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.gated
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        if config.gated:
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, residual: mx.array, x: mx.array) -> mx.array:
        hidden = self.wi(x)
        hidden = gelu(self.gate(x)) * hidden if self.gated else mx.maximum(hidden, 0)
        return add_dense(residual, self.wo, hidden)


class Block(nn.Module):
    """(B·L, D) → (B·L, D), all texts in one: with three axes each product takes two operations more."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.epsilon)
        self.attention = Attention(config)
        self.ff_norm = nn.RMSNorm(config.d_model, config.epsilon)
        self.ff = FeedForward(config)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        x = self.attention(x, self.attention_norm(x), bias)
        return self.ff(x, self.ff_norm(x))


class T5Encoder(nn.Module):
    """Token ids and mask to the last hidden states."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # one table, stored with the first block, serves all of them
        self.relative_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.blocks = [Block(config) for _ in range(config.num_layers)]
        self.final_norm = nn.RMSNorm(config.d_model, config.epsilon)
        self.compiles = False

    def compile(self) -> None:
        """Says that a GPU's encoder becomes part of a compiled function; such a one may have kernels of our own."""
        for module in (self, *(block.attention for block in self.blocks)):
            module.compiles = True

    def __call__(self, input_ids: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """ids (B, L) and mask (B, L), nonzero where a token is real, None if all are → states (B, L, d_model)."""
        batch, length = input_ids.shape
        buckets = mx.array(relative_buckets(length, self.config.num_buckets, self.config.max_distance))
        bias = self.relative_bias(buckets).transpose(2, 0, 1)[None, :, None]
        if attention_mask is None:
            # its memory in order: otherwise each layer's product copies it first
            bias = mx.contiguous(mx.broadcast_to(bias, (1, bias.shape[1], batch, length, length)))
            if self.compiles:
                mx.async_eval(bias)  # now, lest it be part of a compiled function and made at each call
        else:
            # finite, so that a row without any real token stays free of NaN
            bias = bias + mx.where(attention_mask[:, None, :] != 0, 0.0, mx.finfo(mx.float32).min)
        x = self.embedding(input_ids.flatten())
        for block in self.blocks:
            x = block(x, bias)
        return self.final_norm(x).reshape(*input_ids.shape, -1)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each pair of positions, (query, key), int32; float32 logarithms, as transformers computes them."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), exact).astype(np.float32)
    growth = np.log(far / np.float32(exact)) / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), np.minimum(exact + growth.astype(np.int32), half - 1))
    return (bucket + (distance > 0) * half).astype(np.int32)
