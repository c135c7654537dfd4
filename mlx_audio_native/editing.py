"""Sampling that starts from sound: all of it noised in part, or a stretch of it filled in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np

from .config import ModelConfig
from .errors import MlxAudioError
from .oobleck import Autoencoder
from .request import Request
from .sampling import FLOWS, State, Velocity, sample_from


def edit(
    config: ModelConfig, autoencoder: Autoencoder, request: Request, velocity: Velocity, noise: Iterator[mx.array]
) -> Iterator[State]:
    """The states of a request that has a source."""
    latents = encode_window(autoencoder, request.source.samples, config.latent_length)
    how = noise, request.sampler, request.steps, request.noise_level
    if request.inpaint is None:
        return sample_from(velocity, latents, *how)
    kept = kept_latents(config, *request.inpaint)
    held = hold(velocity, latents, kept, config.objective)
    return _end_with(latents, kept, sample_from(held, latents, *how))


def encode_window(autoencoder: Autoencoder, samples: np.ndarray, length: int) -> mx.array:
    """Latents (1, `length`, C), the encoder's means, of samples (frames, channels) with silence behind them."""
    missing = length * autoencoder.config.downsampling_ratio - len(samples)
    latents = autoencoder.encode(mx.array(np.pad(samples, ((0, missing), (0, 0))))[None])[:, :length]
    if not mx.isfinite(latents).all().item():
        raise MlxAudioError("the init audio's latents came out as NaN or infinity")
    return latents


def kept_latents(config: ModelConfig, start: float, end: float) -> mx.array:
    """(T, 1): true for latent frames that lie wholly outside of the seconds from start to end."""
    per_second = config.sample_rate / config.downsampling_ratio
    frames = mx.arange(config.latent_length)[:, None]
    tiny = 1e-6  # seconds that mean a whole frame may come to a little less
    return (frames < math.floor(start * per_second + tiny)) | (frames >= math.ceil(end * per_second - tiny))


def hold(velocity: Velocity, latents: mx.array, kept: mx.array, objective: str) -> Velocity:
    """A velocity of which every sampler concludes that where `kept`, `latents` are the clean ones.

    So at every step that part is `latents` noised to the step's level, and the model fills in what fits it.
    """

    def held(x: mx.array, t: float) -> mx.array:
        v = velocity(x, t)
        if t == 0:  # only rk4 looks there, at the end
            return v
        angle = t * math.pi / 2
        known = (x - latents) / t if objective in FLOWS else (math.cos(angle) * x - latents) / math.sin(angle)
        return mx.where(kept, known, v)

    return held


def _end_with(latents: mx.array, kept: mx.array, states: Iterator[State]) -> Iterator[State]:
    """The states, the last of them with `latents` themselves where `kept`: to the bit, and with rk4 at all."""
    for state in states:
        if state.step == state.steps:
            state = replace(state, latents=mx.where(kept, latents, state.latents))
        yield state
