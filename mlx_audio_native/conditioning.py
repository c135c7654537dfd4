"""Text and numbers to what the DiT listens to: cross-attention tokens, their mask, and the global vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple
from weakref import proxy

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import cuda
from .errors import InputError
from .schema import Section, check, nearest
from .t5 import T5Config, T5Encoder

FEATURES = ("x", "sin", "cos")
# x·w times 2, then times pi in float32: the order of the reference's multiplications
ANGLE_CONSTANTS = (2.0, 3.1415927410125732)
_BLOCK = 16
_AT_ONCE, _FEW = 8, 256  # bytes


@dataclass(frozen=True)
class PromptConfig:
    """The text conditioner: `encode_length` tokens go through T5, the first `max_length` come out."""

    id: str
    max_length: int
    encode_length: int
    project_out: bool
    t5_model_name: str
    t5_config: T5Config

    @classmethod
    def read(cls, id_: str, section: Section, cond_dim: int, text_encoder: dict[str, Any] | None) -> PromptConfig:
        max_length = section.size("max_length", 128, most=2**14)
        encode_length = section.size("encode_length", max_length, most=2**14)
        where = f"{section.where}.encode_length"
        check(encode_length >= max_length, f"{where} {encode_length} is below max_length {max_length}")
        name, own = section.take("t5_model_name", str, "t5-base"), section.take("t5_config", dict, None)
        if own is not None:
            t5_config = T5Config.read(Section(own, f"{section.where}.t5_config"))
        elif text_encoder is not None:
            t5_config = T5Config.read(Section(text_encoder, "text_encoder/config.json"))
        else:
            t5_config = T5Config.named(name)
        project_out = section.take("project_out", bool, False) or t5_config.d_model != cond_dim
        section.without_effect("enable_grad")
        return cls(id_, max_length, encode_length, project_out, name, t5_config)


@dataclass(frozen=True)
class NumberConfig:
    """A number conditioner. `scale` None means division by max - min, which is how the reference normalises."""

    id: str
    min: float
    max: float
    features: tuple[str, ...]
    scale: float | None
    angle_constants: tuple[float, ...]

    @classmethod
    def read(cls, id_: str, section: Section) -> NumberConfig:
        low, high = section.take("min_val", float, 0.0), section.take("max_val", float, 1.0)
        check(low < high, f"{section.where} has min_val {low:g}, which is not below max_val {high:g}")
        features = section.many("features", str, FEATURES)
        fits = features and set(features) <= set(FEATURES) and len(set(features)) == len(features)
        check(fits, f"{section.where}.features must be different ones of x, sin and cos, found {features!r:.60}")
        angles = section.many("angle_constants", float, ANGLE_CONSTANTS)
        return cls(id_, low, high, features, section.take("scale", float, None), tuple(map(float, angles)))

    def width(self, frequencies: int) -> int:
        """Features that `frequencies` give: one for x, one a frequency for sine and cosine."""
        return sum(1 if feature == "x" else frequencies for feature in self.features)


@dataclass(frozen=True)
class ConditioningConfig:
    """All conditioners, and which of them feed cross-attention and the global vector, in order."""

    cond_dim: int
    prompt: PromptConfig
    numbers: tuple[NumberConfig, ...]
    cross_attention_ids: tuple[str, ...]
    global_ids: tuple[str, ...]

    @classmethod
    def read(cls, section: Section, diffusion: Section, text_encoder: dict[str, Any] | None) -> ConditioningConfig:
        """Read `model.conditioning`, and from `model.diffusion` the two lists of ids."""
        cond_dim = section.size("cond_dim")
        section.one_of("default_keys", ({},), {})
        section.one_of("pre_encoded_keys", ([],), [])
        prompts, numbers = [], []
        for index, values in enumerate(section.many("configs", dict)):
            entry = Section(values, f"{section.where}.configs[{index}]")
            id_, kind, config = entry.take("id", str), entry.one_of("type", ("t5", "number")), entry.section("config")
            entry.done()
            check(id_.isidentifier(), f"{entry.where}.id {id_!r:.60} is not a plain name")
            width = config.size("output_dim", cond_dim)
            check(width == cond_dim, f"{config.where}.output_dim is {width}, cond_dim {cond_dim}")
            if kind == "t5":
                prompts.append(PromptConfig.read(id_, config, cond_dim, text_encoder))
            else:
                numbers.append(NumberConfig.read(id_, config))
            config.done()
        section.done()
        check(len(prompts) == 1, f"{section.where} has {len(prompts)} t5 conditioners; exactly one can be honoured")
        known = [config.id for config in (*prompts, *numbers)]
        check(len(set(known)) == len(known), f"{section.where} has two conditioners of one id: {', '.join(known)}")
        fed = {}
        for key in ("cross_attention_cond_ids", "global_cond_ids"):
            fed[key] = diffusion.many(key, str, ())
            check(fed[key], f"{diffusion.where}.{key} is empty, which cannot be honoured")
            for id_ in fed[key]:
                check(id_ in known, f"{diffusion.where}.{key} names no conditioner: {id_!r:.60}{nearest(id_, known)}")
        cross_attention_ids, global_ids = fed.values()
        check(prompts[0].id not in global_ids, f"{diffusion.where}.global_cond_ids has the text, which is no vector")
        for id_ in known:
            check(id_ in cross_attention_ids + global_ids, f"conditioner {id_!r} feeds nothing in {diffusion.where}")
        return cls(cond_dim, prompts[0], tuple(numbers), cross_attention_ids, global_ids)


class Conditioning(NamedTuple):
    """`cross_attention` (B, N, D), `mask` (B, N) and `global_cond` (B, G), all float32; the mask is 1 where real."""

    cross_attention: mx.array
    mask: mx.array
    global_cond: mx.array


class NumberEmbedder(nn.Module):
    """Numbers (B,) to embeddings (B, D): `[x, sin(2π·x·w), cos(2π·x·w)] @ Wᵀ + b` for x in 0..1.

    Source: NumberConditioner and LearnedPositionalEmbedding of stable-audio-tools. Not the DiT's timestep features,
    which are cosine first and have no x.
    """

    def __init__(self, config: NumberConfig, dim: int, frequencies: int) -> None:
        super().__init__()
        self.config = config
        self.frequencies = mx.zeros((frequencies,))
        self.weight = mx.zeros((dim, config.width(frequencies)))
        self.bias = mx.zeros((dim,))

    def __call__(self, values: Any) -> mx.array:
        return self.embed(mx.concatenate(_send(self.normalise(values))))

    def normalise(self, values: Any) -> np.ndarray:
        """Numbers (B,) to x. By NumPy: on a GPU an operation on these few takes as long as on a whole embedding."""
        config = self.config
        with np.errstate(over="ignore"):  # a config's bounds may be beyond float32
            x = _as_numpy(values).astype(np.float32).clip(config.min, config.max) - config.min
            return x / (config.max - config.min) if config.scale is None else x * config.scale

    def embed(self, x: mx.array) -> mx.array:
        config, x = self.config, x[:, None]
        angles = x * self.frequencies
        for constant in config.angle_constants:
            angles = angles * constant
        features = {"x": x, "sin": mx.sin(angles), "cos": mx.cos(angles)}
        features = mx.concatenate([features[name] for name in config.features], axis=1)
        # no matrix product: on a GPU it may round to TF32, which is 3e-4 off here
        terms = features[:, None, :] * self.weight
        if mx.default_device() == mx.gpu:
            return terms.sum(-1) + self.bias
        # summed in blocks, as the CPU adds one by one: 257 terms in a row lose most of the bound of 1e-6
        terms = mx.pad(terms, ((0, 0), (0, 0), (0, -terms.shape[-1] % _BLOCK)))
        return terms.reshape(*terms.shape[:2], -1, _BLOCK).sum(-1).sum(-1) + self.bias


class Conditioner(nn.Module):
    """`frequencies` says how many each number conditioner has; the reference's have 128."""

    def __init__(self, config: ConditioningConfig, frequencies: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        self.t5 = T5Encoder(config.prompt.t5_config)
        if config.prompt.project_out:
            self.project_out = nn.Linear(config.prompt.t5_config.d_model, config.cond_dim)
        self.numbers = {
            number.id: NumberEmbedder(number, config.cond_dim, frequencies[number.id]) for number in config.numbers
        }
        self.compiles = False

    def compile(self) -> None:
        """Has a GPU's `encode` compiled, at the first call of each shape, with the weights as they are then."""
        self.compiles = True
        self.t5.compile()

    def encode(self, input_ids: Any, attention_mask: Any, **numbers: Any) -> Conditioning:
        """Token ids and mask (B, L), L up to `encode_length`, and values for each number conditioner, (B,) or one.

        Anything that mx.array takes. The number of tokens that come out does not depend on L. Raises InputError.
        """
        for id_ in numbers:
            if id_ not in self.numbers:
                raise InputError(f"this model has no number conditioner {id_!r}{nearest(id_, list(self.numbers))}")
        ids, real = self._read_text(input_ids, attention_mask)
        given = {}
        for id_, embedder in self.numbers.items():
            if id_ not in numbers:
                raise InputError(f"this model also needs {id_}")
            given[id_] = _send(embedder.normalise(_as_numbers(id_, numbers[id_], len(ids))))
        compiled = self.compiles and mx.default_device() == mx.gpu
        function = self._compiled if compiled else self._encode
        # most texts come alone, so that there is nothing to mask
        return function(ids.shape, _send(ids.flatten()), [] if real.all() else _send(real.flatten()), given)

    @cached_property
    def _compiled(self) -> Callable[..., Conditioning]:
        return mx.compile(partial(Conditioner._encode, proxy(self)))  # a cycle would outlive the model

    def _encode(
        self, shape: tuple[int, int], ids: list[mx.array], real: list[mx.array], numbers: dict[str, list[mx.array]]
    ) -> Conditioning:
        """`encode` of what was checked, by `_send`: ids of this shape, which are real (none if all are), numbers."""
        prompt, batch = self.config.prompt, shape[0]
        attended = mx.concatenate(real).reshape(shape) if real else None
        states = self.t5(mx.concatenate(ids).reshape(shape), attended)[:, : prompt.max_length]
        if prompt.project_out:
            states = self.project_out(states)
        heard = mx.ones(states.shape[:2])
        if attended is not None:
            heard = attended[:, : prompt.max_length].astype(mx.float32)
            states = states * heard[..., None]
        missing, zero = prompt.max_length - states.shape[1], mx.array(0.0)
        tokens = [states, mx.broadcast_to(zero, (batch, missing, states.shape[-1]))] if missing else [states]
        text_mask = [heard, mx.broadcast_to(zero, (batch, missing))] if missing else [heard]
        embedded = {id_: self.numbers[id_].embed(mx.concatenate(x)) for id_, x in numbers.items()}
        parts, masks = [], []
        for id_ in self.config.cross_attention_ids:
            parts += [embedded[id_][:, None]] if id_ in embedded else tokens
            masks += [mx.ones((batch, 1))] if id_ in embedded else text_mask
        return Conditioning(
            cross_attention=mx.concatenate(parts, axis=1),
            mask=mx.concatenate(masks, axis=1),  # computed when somebody reads it
            global_cond=mx.concatenate([embedded[id_] for id_ in self.config.global_ids], axis=-1),
        )

    def _read_text(self, input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """The ids, and which are real, both (B, up to the last real token)."""
        prompt = self.config.prompt
        ids, mask = _as_numpy(input_ids), _as_numpy(attention_mask)
        if ids.ndim != 2 or ids.shape != mask.shape or not 1 <= ids.shape[1] <= prompt.encode_length or not ids.size:
            raise InputError(
                f"token ids and mask must have one shape (batch, up to {prompt.encode_length} tokens), "
                f"found {ids.shape} and {mask.shape}"
            )
        if ids.dtype.kind not in "iu":
            raise InputError(f"token ids must be whole numbers, found {mx.array(input_ids).dtype}")
        vocab_size = prompt.t5_config.vocab_size
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise InputError(f"token ids must be from 0 to {vocab_size - 1}")
        real = mask != 0
        # padding after the last real token changes nothing but the time it takes
        columns = np.flatnonzero(real.any(0))
        last = columns[-1] + 1 if columns.size else 1
        return ids[:, :last].astype(np.uint16 if vocab_size <= 2**16 else np.int32), real[:, :last]


def _send(values: np.ndarray) -> list[mx.array]:
    """Values (N,) as arrays that are to be concatenated.

    For an NVIDIA GPU few of them by 8 bytes, which MLX keeps where both sides read them as they lie: a larger array
    moves by pages, which takes 0.2 ms at its first use there, and an operation 5 µs.
    """
    size = len(values)
    if cuda.is_default() and values.nbytes <= _FEW:
        size = _AT_ONCE // values.itemsize
    return [mx.array(values[start : start + size]) for start in range(0, len(values), size)]


def _as_numpy(values: Any) -> np.ndarray:
    """What mx.array takes, read without it where possible: a value that has to come back from a GPU is waited for."""
    try:
        array = np.asarray(values)
    except ValueError:  # bfloat16, or rows of several lengths, which MLX refuses too
        array = None
    if array is not None and array.dtype.kind in "biuf":
        return array
    found = mx.array(values)
    return np.asarray(found.astype(mx.float32) if found.dtype == mx.bfloat16 else found)


def _as_numbers(id_: str, values: Any, batch: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond float32 is not finite, which is said below
        values = _as_numpy(values).astype(np.float32).reshape(-1)
    if values.size not in (1, batch):
        raise InputError(f"{id_} has {values.size} values for a batch of {batch}")
    if not np.isfinite(values).all():
        raise InputError(f"{id_} must be finite")
    return values.repeat(batch // values.size)
