"""The Oobleck autoencoder of stable-audio-tools (`autoencoders.py` there), both directions, and its config."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from math import ceil, prod

import mlx.core as mx
import mlx.nn as nn

from . import cuda_oobleck
from .convolution import Conv, Downsample, Upsample
from .elementwise import sine
from .errors import InputError
from .schema import Section, check

_DILATIONS = (1, 3, 9)
_KERNEL = 7
_AT_ONCE = 2**19  # audio frames to decode at a time: 256 latent frames of stable-audio-open, the small one's window
_LARGEST = 2**30  # bytes of the largest array in decoding: 8 such windows in half precision; more clips are in groups
_HANDED_OVER = 2**27  # bytes at least that pieces of decoding return until they are evaluated; short clips return less
_HELD = 5  # times so much in use, and decoding waits for what is due to be freed,
_PATIENCE = 2e-4  # but so many seconds at most: the GPU is busy with one piece meanwhile

# takes the arrays that the one before it returned
Piece = Callable[..., tuple[mx.array, ...]]


@dataclass(frozen=True)
class OobleckConfig:
    """One direction, listed from the audio end: `widths` are the channels at full rate and after each of `strides`."""

    audio_channels: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    latent_dim: int
    use_snake: bool
    final_tanh: bool = False

    @classmethod
    def read(cls, coder: Section, audio_key: str) -> OobleckConfig:
        """Read `encoder` or `decoder`, whose audio channels stand under `audio_key`. Raises ConfigError."""
        coder.one_of("type", ("oobleck",))
        section = coder.section("config")
        coder.without_effect("requires_grad")
        coder.done()
        channels = section.size("channels", 128)
        c_mults = section.many("c_mults", int, (1, 2, 4, 8))
        strides = section.many("strides", int, (2, 4, 8, 8))
        check(0 < len(c_mults) == len(strides) < 20, f"{section.where}: {len(c_mults)} c_mults, {len(strides)} strides")
        check(all(1 <= mult <= 2**12 for mult in c_mults), f"{section.where}.c_mults are from 1 to 4096")
        check(all(1 <= stride <= 2**12 for stride in strides), f"{section.where}.strides are from 1 to 4096")
        section.one_of("antialias_activation", (False,), False)
        decoding = audio_key == "out_channels"
        if decoding:
            section.one_of("use_nearest_upsample", (False,), False)
        config = cls(
            audio_channels=section.size(audio_key, 2),
            widths=tuple(channels * mult for mult in (1, *c_mults)),
            strides=strides,
            latent_dim=section.size("latent_dim", 32),
            use_snake=section.take("use_snake", bool, False),
            final_tanh=section.take("final_tanh", bool, True) if decoding else False,
        )
        section.done()
        return config


@dataclass(frozen=True)
class AutoencoderConfig:
    """`vae` means that the encoder emits means and scales; `scale` is what decoding multiplies latents by.

    `encoder` is None where there is none: a TFLite export may hold the decoder alone.
    """

    encoder: OobleckConfig | None
    decoder: OobleckConfig
    vae: bool
    scale: float
    soft_clip: bool

    @classmethod
    def read(cls, pretransform: Section) -> AutoencoderConfig:
        """Read `model.pretransform`. Raises ConfigError."""
        pretransform.one_of("type", ("autoencoder",))
        scale = pretransform.take("scale", float, 1.0)
        check(scale != 0, f"{pretransform.where}.scale is 0")
        section = pretransform.section("config")
        # how the reference spends memory and precision, not what it computes
        pretransform.without_effect("model_half", "iterate_batch", "chunked", "enable_grad")
        pretransform.done()

        bottleneck = section.section("bottleneck", {"type": None})
        vae = bottleneck.one_of("type", ("vae", None)) == "vae"
        bottleneck.one_of("config", ({},), {})
        bottleneck.without_effect("requires_grad")
        bottleneck.done()
        encoder, decoder = section.take("encoder", dict, None), section.section("decoder")
        if encoder is not None:
            encoder = OobleckConfig.read(Section(encoder, f"{section.where}.encoder"), "in_channels")
        soft_clip = decoder.take("soft_clip", bool, False)
        config = cls(encoder, OobleckConfig.read(decoder, "out_channels"), vae, scale, soft_clip)
        audio_channels, latent_dim = section.size("io_channels"), section.size("latent_dim")
        in_channels = section.size("in_channels", audio_channels)
        sizes = [("downsampling_ratio", section.size("downsampling_ratio"), config.downsampling_ratio)]
        if encoder is not None:
            sizes += [
                ("encoder strides multiply to a ratio that", prod(encoder.strides), config.downsampling_ratio),
                ("in_channels", in_channels, encoder.audio_channels),
                ("encoder latent_dim", encoder.latent_dim, 2 * latent_dim if vae else latent_dim),
            ]
        sizes += [
            ("out_channels", section.size("out_channels", audio_channels), config.decoder.audio_channels),
            ("decoder latent_dim", config.decoder.latent_dim, latent_dim),
        ]
        for name, value, expected in sizes:
            check(value == expected, f"sizes do not fit: {section.where}: {name} is {value}, expected {expected}")
        section.one_of("pretransform", (None,), None)
        section.done()
        return config

    @property
    def downsampling_ratio(self) -> int:
        """Audio frames to one latent frame."""
        return prod(self.decoder.strides)

    def decoded_frames(self, latents: int) -> int:
        """Audio frames that so many latent frames decode to; an odd stride loses one."""
        for stride in reversed(self.decoder.strides):
            latents = latents * stride - stride % 2
        return latents

    def latents_for(self, frames: int) -> int:
        """How many latent frames, from the first on, have a part in the first `frames` audio frames."""
        return self._heard(0, frames - 1)[1] + 1

    def largest(self, latents: int) -> int:
        """Elements of the largest array in decoding a clip of so many latent frames."""
        rate, sizes = self.downsampling_ratio, []
        widths, strides = self.decoder.widths, self.decoder.strides
        for (width, wider), stride in zip(pairwise(widths), strides, strict=True):
            # what a stage makes, and its input by pairs of frames
            sizes += [rate * width, rate // stride * 2 * wider]
            rate //= stride
        return latents * max(sizes)

    @property
    def at_once(self) -> int:
        """How many latent frames are decoded as a whole; more are in chunks, see `chunks`."""
        return max(_AT_ONCE // self.downsampling_ratio, 1)

    def chunks(self, latents: int) -> Iterator[tuple[slice, slice]]:
        """Pieces of so many latent frames, all of one length, and which audio frames of each to keep.

        Up to `at_once` are one piece, and pieces are at most so long, or twice what a frame hears. They overlap by what
        a frame hears, so that those kept are what they are in the whole. A latent frame's audio frames begin at
        `downsampling_ratio` times its place, also after odd strides: what these lose is at the end.
        """
        if latents <= self.at_once:
            yield slice(0, latents), slice(None)
            return
        ratio = self.downsampling_ratio
        first, last = self._heard(0, ratio - 1)
        overlap = last - first
        step = ceil(latents / ceil(latents / max(self.at_once - overlap, overlap)))
        length = min(step + overlap, latents)
        for start in range(0, latents, step):
            left = min(max(start + first, 0), latents - length)
            yield slice(left, left + length), slice((start - left) * ratio, (start - left + step) * ratio)

    def _heard(self, first: int, last: int) -> tuple[int, int]:
        """The first and the last latent frame with a part in audio frames first to last; maybe outside of the clip."""
        reach = _KERNEL // 2
        first, last = first - reach, last + reach
        for stride in self.decoder.strides:
            units, cut = reach * sum(_DILATIONS), ceil(stride / 2)
            # a block of `stride` frames hears the latent frame of its place and the one before
            first = (first - units + cut) // stride - 1
            last = (last + units + cut) // stride
        return first - reach, last + reach


class Snake(nn.Module):
    """`x + sin²(exp(α)·x) / (exp(β) + 1e-9)`; the two functions of α and β are folded when weights are loaded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frequency = mx.ones((channels,))
        self.magnitude = mx.ones((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.magnitude * mx.square(sine(self.frequency * x))


class ELU(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return mx.where(x > 0, x, mx.expm1(x))


def _activation(config: OobleckConfig, channels: int) -> nn.Module:
    return Snake(channels) if config.use_snake else ELU()


class Sequence(nn.Module):
    """Layers in the reference's order and numbering, so that its names fit."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = list(layers)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class ResidualUnit(Sequence):
    """Two halves, which pass each other what is convolved and what is added at the end."""

    def __init__(self, config: OobleckConfig, channels: int, dilation: int) -> None:
        super().__init__(
            _activation(config, channels),
            Conv(channels, channels, _KERNEL, dilation),
            _activation(config, channels),
            Conv(channels, channels, 1),
        )

    def __call__(self, x: mx.array) -> mx.array:
        (x,) = self.end(*self.begin(x))
        return x

    def begin(self, x: mx.array) -> tuple[mx.array, ...]:
        outer, dilated, _, _ = self.layers
        return dilated(outer(x)), x

    def end(self, y: mx.array, x: mx.array) -> tuple[mx.array, ...]:
        _, _, inner, dense = self.layers
        return (x + dense(inner(y)),)


class Encoder(Sequence):
    """Audio (B, frames, channels) to latents before the bottleneck."""

    def __init__(self, config: OobleckConfig) -> None:
        widths = config.widths
        layers = [Conv(config.audio_channels, widths[0], _KERNEL)]
        for (width, wider), stride in zip(pairwise(widths), config.strides, strict=True):
            units = (ResidualUnit(config, width, dilation) for dilation in _DILATIONS)
            layers.append(Sequence(*units, _activation(config, width), Downsample(width, wider, stride)))
        super().__init__(*layers, _activation(config, widths[-1]), Conv(widths[-1], config.latent_dim, 3))


class Decoder(Sequence):
    """Latents to audio."""

    def __init__(self, config: OobleckConfig) -> None:
        widths = config.widths[::-1]
        layers = [Conv(config.latent_dim, widths[0], _KERNEL)]
        for (width, narrower), stride in zip(pairwise(widths), config.strides[::-1], strict=True):
            units = (ResidualUnit(config, narrower, dilation) for dilation in _DILATIONS)
            layers.append(Sequence(_activation(config, width), Upsample(width, narrower, stride), *units))
        last = Conv(widths[-1], config.audio_channels, _KERNEL, bias=False)
        final = nn.Tanh() if config.final_tanh else nn.Identity()
        super().__init__(*layers, _activation(config, widths[-1]), last, final)

    def pieces(self) -> Iterator[Piece]:
        """The decoder as functions to call in turn, from latents to audio: a stage's start, a half of a unit."""
        first, *stages, activation, last, final = self.layers
        yield partial(_through, [first])
        for stage in stages:
            before, up, *units = stage.layers
            yield partial(_through, [before, up])
            for unit in units:
                yield from (unit.begin, unit.end)
        yield partial(_through, [activation, last, final])


def _through(layers: list[Callable[[mx.array], mx.array]], x: mx.array) -> tuple[mx.array, ...]:
    for layer in layers:
        x = layer(x)
    return (x,)


class Autoencoder(nn.Module):
    """Latents (B, T, C) ↔ audio (B, frames, channels)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.encoder:
            self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(config.decoder)
        self.compiles = False

    @property
    def dtype(self) -> mx.Dtype:
        return self.decoder.layers[0].weight.dtype

    def compile(self) -> None:
        """Has a GPU decode by compiled pieces, an NVIDIA one by `cuda_oobleck`; they keep the weights of then."""
        self.compiles = True

    def decode(self, latents: mx.array) -> mx.array:
        """Audio in float32, as the decoder emits it: not clipped. Raises InputError.

        More than `at_once` latent frames are decoded in chunks, many clips in groups, each evaluated before the next.
        """
        channels = self.config.decoder.latent_dim
        if latents.ndim != 3 or latents.shape[-1] != channels or not latents.size:
            raise InputError(f"latents must be (batch, frames, {channels}), found {latents.shape}")
        pieces = list(self.config.chunks(latents.shape[1]))
        largest = self.config.largest(pieces[0][0].stop - pieces[0][0].start) * self.dtype.size
        clips = ceil(len(latents) / ceil(len(latents) / max(_LARGEST // largest, 1)))
        groups = []
        for start in range(0, len(latents), clips):
            group = latents[start : start + clips]
            parts = [self._evaluated(group[:, heard], kept) for heard, kept in pieces]
            groups.append(mx.concatenate(parts, axis=1))
        return mx.concatenate(groups)

    def _evaluated(self, latents: mx.array, kept: slice) -> mx.array:
        """Some pieces at a time, handed over while those before are computed: MLX takes memory for all that it has."""
        largest = len(latents) * self.config.largest(latents.shape[1]) * self.dtype.size
        bound = max(_HANDED_OVER, largest)
        begun, size, most = (), 0, mx.get_active_memory() + _HELD * bound
        for state in self._states(latents):
            size += sum(array.nbytes for array in state)
            if size >= bound:
                mx.async_eval(state)
                mx.eval(begun)
                begun, size = state, 0
                # a thread of MLX frees what was computed, sometimes some pieces later
                late = time.perf_counter() + _PATIENCE
                while mx.get_active_memory() > most and time.perf_counter() < late:
                    time.sleep(0)
        audio = mx.contiguous(state[0][:, kept])
        mx.eval(audio)
        return audio

    def decode_whole(self, latents: mx.array) -> mx.array:
        """As `decode` of latents that it accepts, in one piece and not evaluated."""
        *_, (audio,) = self._states(latents)
        return audio

    def _states(self, latents: mx.array) -> Iterator[tuple[mx.array, ...]]:
        """What each piece of decoding returns, not evaluated; the last one returns the audio alone."""
        state = ((latents * self.config.scale).astype(self.dtype),)
        for piece in self._pieces():
            state = piece(*state)
            yield state
        audio = state[0].astype(mx.float32)
        yield (mx.tanh(audio) if self.config.soft_clip else audio,)

    def _pieces(self) -> Iterable[Piece]:
        return self._compiled if self.compiles and mx.default_device() == mx.gpu else self.decoder.pieces()

    @cached_property
    def _compiled(self) -> list[Piece]:
        """None of them holds this module, so that it is freed together with what is compiled."""
        if cuda_oobleck.usable(self.config.decoder):
            return list(cuda_oobleck.pieces(self.decoder))
        return [mx.compile(piece) for piece in self.decoder.pieces()]

    def encode(self, audio: mx.array, key: mx.array | None = None) -> mx.array:
        """Latents in float32: the means, or with a key a draw from N(mean, (softplus(scale) + 1e-4)²).

        Frames beyond a whole number of latent frames are not heard in full: pad them. Raises InputError.
        """
        if self.config.encoder is None:
            raise InputError("this model has no encoder, so it cannot turn audio into latents")
        channels, ratio = self.config.encoder.audio_channels, self.config.downsampling_ratio
        if audio.ndim != 3 or audio.shape[-1] != channels or audio.shape[1] < ratio or not len(audio):
            raise InputError(f"audio must be (batch, at least {ratio} frames, {channels}), found {audio.shape}")
        latents = self.encoder(audio.astype(self.dtype)).astype(mx.float32)
        if self.config.vae:
            latents, scale = mx.split(latents, 2, axis=-1)
            if key is not None:
                deviation = nn.softplus(scale) + 1e-4
                latents = latents + deviation * mx.random.normal(latents.shape, key=key)
        return latents / self.config.scale
