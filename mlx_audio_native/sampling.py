"""Schedules and samplers for rectified-flow models, as pure functions of a velocity, latents, a schedule and noise.

Time runs from 1 (noise) down to 0 (clean). A velocity v predicts noise - clean, so x - t·v(x, t) is the clean latents
as seen from time t. Formulas: stable-audio-tools 0.0.19, inference/sampling.py and models/dit.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from .errors import InputError

Velocity = Callable[[mx.array, float], mx.array]
"""(latents (B, T, C), time in 0..1) → velocity (B, T, C)."""

# Just above sigmoid(-2) = 0.11920, below which the reference's log-SNR line runs upwards, to fail at 0.
LINEAR_BELOW = 0.1193


@dataclass(frozen=True)
class State:
    """Latents (B, T, C), not yet evaluated, after `step` of `steps` steps; those of the last state are clean."""

    step: int
    steps: int
    latents: mx.array


def log_snr_schedule(steps: int, sigma_max: float = 1.0) -> list[float]:
    """Times of `steps` steps, evenly spaced in log-SNR, from sigma_max down to 0: steps + 1 values.

    The reference's, except below LINEAR_BELOW, where it is `linear_schedule`. At sigma_max 0 there is no step: [0.0].
    """
    if sigma_max < LINEAR_BELOW:
        return linear_schedule(steps, sigma_max)
    start = -6.0 if sigma_max == 1 else math.log((1 - sigma_max) / sigma_max + 1e-6)
    line = (start + (2 - start) * i / steps for i in range(1, steps))
    return [sigma_max, *(1 / (1 + math.exp(log_snr)) for log_snr in line), 0.0]


def linear_schedule(steps: int, sigma_max: float = 1.0) -> list[float]:
    """Times of `steps` steps, evenly spaced from sigma_max down to 0: steps + 1 values. At sigma_max 0: [0.0]."""
    return [sigma_max * ((steps - i) / steps) for i in range(steps + 1)] if sigma_max > 0 else [0.0]


def pingpong(
    velocity: Velocity, x: mx.array, schedule: Sequence[float], noise: Iterator[mx.array]
) -> Iterator[mx.array]:
    """Jumps to the clean estimate, then back to the next time with fresh noise, at every step."""
    for t, t_next in pairwise(schedule):
        x = x - t * velocity(x, t)
        if t_next > 0:
            x = (1 - t_next) * x + t_next * next(noise)
        yield x


def euler(velocity: Velocity, x: mx.array, schedule: Sequence[float], noise: Iterator[mx.array]) -> Iterator[mx.array]:
    """First order, one velocity a step; draws no noise."""
    for t, t_next in pairwise(schedule):
        x = x + (t_next - t) * velocity(x, t)
        yield x


def rk4(velocity: Velocity, x: mx.array, schedule: Sequence[float], noise: Iterator[mx.array]) -> Iterator[mx.array]:
    """Classic Runge-Kutta, fourth order, four velocities a step; draws no noise."""
    for t, t_next in pairwise(schedule):
        dt = t_next - t
        k1 = velocity(x, t)
        k2 = velocity(x + dt / 2 * k1, t + dt / 2)
        k3 = velocity(x + dt / 2 * k2, t + dt / 2)
        k4 = velocity(x + dt * k3, t_next)
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        yield x


def dpmpp(velocity: Velocity, x: mx.array, schedule: Sequence[float], noise: Iterator[mx.array]) -> Iterator[mx.array]:
    """DPM-Solver++(2M) on clean estimates extrapolated in log-SNR, one velocity a step; draws no noise.

    The reference's (t'/t)·x - (1-t')·expm1(-h)·clean is written (t'/t)·x + (1 - t'/t)·clean: equal, since e^-h is the
    ratio of the two t/(1-t), and free of infinities at t = 1 and t' = 0.
    """
    previous, previous_log_snr = None, -math.inf
    for t, t_next in pairwise(schedule):
        clean = x - t * velocity(x, t)
        log_snr = math.log((1 - t) / t) if t < 1 else -math.inf
        target = clean
        if previous is not None and t_next > 0:
            h = math.log((1 - t_next) / t_next) - log_snr
            target = clean + h / (2 * (log_snr - previous_log_snr)) * (clean - previous)
        x = (t_next / t) * x + (1 - t_next / t) * target
        previous, previous_log_snr = clean, log_snr
        yield x


class Sampler(NamedTuple):
    """A sampler's step function and the schedule the reference gives it."""

    run: Callable[[Velocity, mx.array, Sequence[float], Iterator[mx.array]], Iterator[mx.array]]
    schedule: Callable[[int, float], list[float]]


SAMPLERS = {
    "pingpong": Sampler(pingpong, log_snr_schedule),
    "euler": Sampler(euler, log_snr_schedule),
    "rk4": Sampler(rk4, linear_schedule),
    "dpmpp": Sampler(dpmpp, log_snr_schedule),
}


class Defaults(NamedTuple):
    """What an objective samples with unless told otherwise."""

    sampler: str
    steps: int
    cfg_scale: float


# As the reference's own interface sets them.
DEFAULTS = {"rf_denoiser": Defaults("pingpong", 8, 1.0), "rectified_flow": Defaults("euler", 50, 7.0)}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name; InputError, naming the known ones, if there is none."""
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}: the samplers are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def find_defaults(objective: str) -> Defaults:
    """The defaults of a config's diffusion_objective; InputError if its samplers are not there."""
    if objective not in DEFAULTS:
        raise InputError(f"cannot sample a model of objective {objective!r}: only {' and '.join(DEFAULTS)}")
    return DEFAULTS[objective]


def sample(
    velocity: Velocity, latents: mx.array, noise: Iterator[mx.array], sampler: str, steps: int, sigma_max: float = 1.0
) -> Iterator[State]:
    """Yields the state after each step, from latents (B, T, C) at time sigma_max to clean ones; at 0, as they are."""
    method = find_sampler(sampler)
    schedule = method.schedule(steps, sigma_max)
    if len(schedule) == 1:
        yield State(0, 0, latents)
    for step, x in enumerate(method.run(velocity, latents, schedule, noise), start=1):
        yield State(step, steps, x)


def clip_noise(seeds: Sequence[int], shape: tuple[int, int]) -> Iterator[mx.array]:
    """Endless standard-normal float32 noise (len(seeds), *shape), one key a clip, split at every draw.

    A clip's noise depends on its own seed alone: not on its neighbours, and not on how many draws follow.
    """
    keys = [mx.random.key(seed) for seed in seeds]
    while True:
        pairs = [mx.random.split(key) for key in keys]
        keys = [pair[0] for pair in pairs]
        yield mx.stack([mx.random.normal(shape, key=pair[1]) for pair in pairs])


def guided(velocity: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance, vu + scale·(vc - vu), of a velocity over two batches: conditional, unconditional."""

    def run(x: mx.array, t: float) -> mx.array:
        conditional, unconditional = mx.split(velocity(mx.concatenate([x, x]), t), 2)
        return unconditional + scale * (conditional - unconditional)

    return run
