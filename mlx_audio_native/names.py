"""Which stored tensor fills which parameter: names, shapes and layouts of stable-audio-tools and Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .conditioning import Conditioner
from .convolution import Conv, Downsample, Upsample, upsampling_taps
from .dit import DiT
from .oobleck import Autoencoder, Snake

PREFIXES = {"conditioner": "conditioner.", "dit": "model.", "autoencoder": "pretransform."}
_CONDITIONERS = "conditioner.conditioners."

# our name, numbers as {}, to stable-audio-tools' or Hugging Face's: of a parameter, or of the layer that holds it
_LAYER = "transformer.layers.{}."
_DIT_NAMES = {
    "timestep_frequencies": "timestep_features.weight",
    "to_timestep_embed.first": "to_timestep_embed.0",
    "to_timestep_embed.second": "to_timestep_embed.2",
    "to_cond_embed.first": "to_cond_embed.0",
    "to_cond_embed.second": "to_cond_embed.2",
    "to_global_embed.first": "to_global_embed.0",
    "to_global_embed.second": "to_global_embed.2",
    "preprocess": "preprocess_conv",
    "postprocess": "postprocess_conv",
    "project_in": "transformer.project_in",
    "project_out": "transformer.project_out",
    "blocks.{}.self_norm.weight": _LAYER + "pre_norm.gamma",
    "blocks.{}.self_norm.bias": _LAYER + "pre_norm.beta",
    "blocks.{}.self_attention.to_qkv": _LAYER + "self_attn.to_qkv",
    "blocks.{}.self_attention.to_out": _LAYER + "self_attn.to_out",
    "blocks.{}.self_attention.q_norm": _LAYER + "self_attn.q_norm",
    "blocks.{}.self_attention.k_norm": _LAYER + "self_attn.k_norm",
    "blocks.{}.cross_norm.weight": _LAYER + "cross_attend_norm.gamma",
    "blocks.{}.cross_norm.bias": _LAYER + "cross_attend_norm.beta",
    "blocks.{}.cross_attention.to_q": _LAYER + "cross_attn.to_q",
    "blocks.{}.cross_attention.to_kv": _LAYER + "cross_attn.to_kv",
    "blocks.{}.cross_attention.to_out": _LAYER + "cross_attn.to_out",
    "blocks.{}.cross_attention.q_norm": _LAYER + "cross_attn.q_norm",
    "blocks.{}.cross_attention.k_norm": _LAYER + "cross_attn.k_norm",
    "blocks.{}.ff_norm.weight": _LAYER + "ff_norm.gamma",
    "blocks.{}.ff_norm.bias": _LAYER + "ff_norm.beta",
    "blocks.{}.ff.proj_in": _LAYER + "ff.ff.0.proj",
    "blocks.{}.ff.proj_out": _LAYER + "ff.ff.2",
}
_BLOCK = "encoder.block.{}.layer."
_T5_NAMES = {
    "embedding": "shared",
    "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "final_norm": "encoder.final_layer_norm",
    "blocks.{}.attention_norm": _BLOCK + "0.layer_norm",
    "blocks.{}.attention.query": _BLOCK + "0.SelfAttention.q",
    "blocks.{}.attention.key": _BLOCK + "0.SelfAttention.k",
    "blocks.{}.attention.value": _BLOCK + "0.SelfAttention.v",
    "blocks.{}.attention.out": _BLOCK + "0.SelfAttention.o",
    "blocks.{}.ff_norm": _BLOCK + "1.layer_norm",
    "blocks.{}.ff.wi": _BLOCK + "1.DenseReluDense.wi",
    "blocks.{}.ff.wo": _BLOCK + "1.DenseReluDense.wo",
}
_GATED_T5_NAMES = {
    **_T5_NAMES,
    "blocks.{}.ff.gate": _BLOCK + "1.DenseReluDense.wi_0",
    "blocks.{}.ff.wi": _BLOCK + "1.DenseReluDense.wi_1",
}
_SNAKE_NAMES = {"frequency": "alpha", "magnitude": "beta"}


Convert = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Entry:
    """A parameter: its own name, the name and shape it is stored under, and how the stored layout becomes ours.

    `packed` are a quantised layer's bits, which have no other dtype.
    """

    target: str
    source: str
    shape: tuple[int, ...]
    convert: Convert | None
    packed: bool = False

    @property
    def exact(self) -> bool:
        """Whether fewer bits than float32 would shift the time."""
        return self.target == "timestep_frequencies" or self.target.startswith("numbers.")


def entries(module: Conditioner | DiT | Autoencoder) -> Iterator[Entry]:
    """An entry for every parameter of a part."""
    owners = dict(module.named_modules())
    for target, array in tree_flatten(module.parameters()):
        path = target.rpartition(".")[0]
        layout = _stored_layout(owners[path], target, array.shape)
        yield Entry(target, source(module, target), *layout, packed=array.dtype == mx.uint32)


def t5_prefix(prompt_id: str) -> str:
    """What stands before T5's Hugging Face names in a model folder."""
    return f"{_CONDITIONERS}{prompt_id}.model."


def number_prefix(number_id: str) -> str:
    """What stands before a number conditioner's frequencies and dense layer."""
    return f"{_CONDITIONERS}{number_id}.embedder.embedding."


def source(module: Conditioner | DiT | Autoencoder, target: str) -> str:
    """The stored name of a part's parameter."""
    if isinstance(module, DiT):
        return "model.model." + _rename(target, _DIT_NAMES)
    if isinstance(module, Autoencoder):
        path, _, key = target.rpartition(".")
        return f"pretransform.model.{path}.{_SNAKE_NAMES.get(key, key)}"
    prompt = module.config.prompt
    head, _, rest = target.partition(".")
    if head == "t5":
        return t5_prefix(prompt.id) + _rename(rest, _GATED_T5_NAMES if prompt.t5_config.gated else _T5_NAMES)
    if head == "project_out":
        return f"{_CONDITIONERS}{prompt.id}.proj_out.{rest}"
    number_id, _, key = rest.partition(".")
    return number_prefix(number_id) + ("0.weights" if key == "frequencies" else f"1.{key}")


def _rename(target: str, table: dict[str, str]) -> str:
    """Look a parameter up, or else its layer, with the block's number put back in."""
    numbers = re.findall(r"\d+", target)
    pattern = re.sub(r"\d+", "{}", target)
    layer, _, key = pattern.rpartition(".")
    name = table[pattern] if pattern in table else f"{table[layer]}.{key}"
    return name.format(*numbers)


def _stored_layout(owner: nn.Module, target: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Convert | None]:
    """The stored shape and how it becomes ours. torch keeps kernels as (out, in, k), transposed (in, out, k)."""
    key = target.rpartition(".")[2]
    if isinstance(owner, Snake):
        return shape, mx.exp if key == "frequency" else lambda beta: 1 / (mx.exp(beta) + 1e-9)
    if key == "timestep_frequencies" or target in ("preprocess.weight", "postprocess.weight"):
        return (*shape, 1), lambda column: column[..., 0]
    if key != "weight":
        return shape, None
    if isinstance(owner, Conv):
        outputs, kernel, inputs = shape
        return (outputs, inputs, kernel), lambda weight: weight.transpose(0, 2, 1)
    if isinstance(owner, Downsample):
        outputs, taps, wide = shape
        stored = outputs, wide // owner.stride, taps * owner.stride
        return stored, lambda weight: weight.transpose(0, 2, 1).reshape(shape)
    if isinstance(owner, Upsample):
        wide, taps, inputs = shape
        return (inputs, wide // owner.stride, taps * owner.stride), upsampling_taps
    return shape, None
