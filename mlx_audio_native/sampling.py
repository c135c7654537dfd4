"""Schedules and samplers, as pure functions of a velocity, latents, a schedule and noise.

Time t runs from 1 (noise) down to 0 (clean). In a rectified flow x is (1-t)·clean + t·noise, and the velocity predicts
noise - clean. Under the objective v, x is cos·clean + sin·noise of the angle t·π/2, and the velocity predicts
cos·noise - sin·clean; samplers named after k-diffusion hold x/cos instead, clean + σ·noise with σ the tangent.
Formulas: stable-audio-tools 0.0.19, inference/sampling.py and models/dit.py; k-diffusion 0.1.1, sampling.py and
external.py.
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
# Noise levels that stable-audio-open-1.0 is released with; the reference's interface offers 0.01 and 100.
SIGMA_MIN, SIGMA_MAX = 0.3, 500.0


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


def polyexponential_schedule(steps: int, sigma_max: float = SIGMA_MAX) -> list[float]:
    """Noise levels of `steps` steps, evenly spaced in log σ from sigma_max to SIGMA_MIN, then 0: steps + 1 values.

    k-diffusion's, whose rho is 1, except where it would not fall: up to SIGMA_MIN it is `linear_schedule`.
    """
    if sigma_max < 1.001 * SIGMA_MIN:
        return linear_schedule(steps, sigma_max)
    fall = math.log(SIGMA_MIN / sigma_max) / max(steps - 1, 1)
    return [*(sigma_max * math.exp(fall * i) for i in range(steps)), 0.0]


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
    """DPM-Solver++(2M) on a rectified flow's clean estimates, one velocity a step; draws no noise."""

    def log_snr(t: float) -> float:
        return math.log((1 - t) / t) if t < 1 else -math.inf

    return _second_order(lambda x, t: x - t * velocity(x, t), log_snr, x, schedule)


def dpmpp_2m(
    velocity: Velocity, x: mx.array, schedule: Sequence[float], noise: Iterator[mx.array]
) -> Iterator[mx.array]:
    """DPM-Solver++(2M) over noise levels, one velocity a step; draws no noise."""
    return _second_order(lambda x, sigma: denoise(velocity, x, sigma), lambda sigma: -math.log(sigma), x, schedule)


def _second_order(
    estimate: Callable[[mx.array, float], mx.array],
    log_snr: Callable[[float], float],
    x: mx.array,
    schedule: Sequence[float],
) -> Iterator[mx.array]:
    """DPM-Solver++(2M) on clean estimates, extrapolated in `log_snr` of the schedule's values, up to a factor.

    The reference's (t'/t)·x - (1-t')·expm1(-h)·clean is written (t'/t)·x + (1 - t'/t)·clean: equal, since e^-h is the
    ratio of the two t/(1-t), and free of infinities at t = 1 and t' = 0. So is k-diffusion's, with σ for both.
    """
    previous, previous_log_snr = None, -math.inf
    for t, t_next in pairwise(schedule):
        clean = estimate(x, t)
        target = clean
        if previous is not None and t_next > 0:
            h, h_last = log_snr(t_next) - log_snr(t), log_snr(t) - previous_log_snr
            target = clean + h / (2 * h_last) * (clean - previous)
        x = (t_next / t) * x + (1 - t_next / t) * target
        previous, previous_log_snr = clean, log_snr(t)
        yield x


def dpmpp_3m_sde(
    velocity: Velocity, x: mx.array, schedule: Sequence[float], noise: Iterator[mx.array]
) -> Iterator[mx.array]:
    """DPM-Solver++(3M) SDE over noise levels, one velocity and, but for the last, one noise a step.

    k-diffusion's at eta 1. Its noise is a Brownian motion's increments over the noise levels, divided by the root of
    their lengths: independent standard normals, as drawn here.
    """
    clean_1 = clean_2 = h_1 = h_2 = None  # of the last step, and of the one before
    for sigma, sigma_next in pairwise(schedule):
        clean = denoise(velocity, x, sigma)
        if sigma_next == 0:
            yield clean
            return
        h = math.log(sigma / sigma_next)
        gone = -math.expm1(-2 * h)
        phi_2 = 1 - gone / (2 * h)
        x = (1 - gone) * x + gone * clean
        if clean_2 is not None:
            slope, slope_1 = (clean - clean_1) * (h / h_1), (clean_1 - clean_2) * (h / h_2)
            curve = (slope - slope_1) * (h / (h_1 + h_2))
            phi_3 = phi_2 / (2 * h) - 0.5
            x = x + phi_2 * (slope + curve * (h_1 / h)) - phi_3 * curve
        elif clean_1 is not None:
            x = x + phi_2 * (h / h_1) * (clean - clean_1)
        x = x + sigma_next * math.sqrt(gone) * next(noise)
        clean_1, clean_2, h_1, h_2 = clean, clean_1, h, h_1
        yield x


def v_ddim(velocity: Velocity, x: mx.array, schedule: Sequence[float], noise: Iterator[mx.array]) -> Iterator[mx.array]:
    """DDIM of the objective v, one velocity a step; draws no noise.

    Clean and noise, as seen from t and put together again at t', come to a rotation of x and v by their angle.
    """
    for t, t_next in pairwise(schedule):
        angle = (t - t_next) * math.pi / 2
        x = math.cos(angle) * x - math.sin(angle) * velocity(x, t)
        yield x


def denoise(velocity: Velocity, x: mx.array, sigma: float) -> mx.array:
    """Clean estimate of x (B, T, C) at a noise level, by a model of the objective v: k-diffusion's VDenoiser."""
    length = math.hypot(sigma, 1)
    return x / length**2 - (sigma / length) * velocity(x / length, 2 * math.atan(sigma) / math.pi)


def straight(clean: mx.array, noise: mx.array, level: float) -> mx.array:
    """Latents of a rectified flow at a time."""
    return (1 - level) * clean + level * noise


def added(clean: mx.array, noise: mx.array, level: float) -> mx.array:
    """Latents of k-diffusion's samplers at a noise level."""
    return clean + level * noise


def rotated(clean: mx.array, noise: mx.array, level: float) -> mx.array:
    """Latents of the objective v at a time."""
    return math.cos(level * math.pi / 2) * clean + math.sin(level * math.pi / 2) * noise


FLOWS = ("rectified_flow", "rf_denoiser")


class Sampler(NamedTuple):
    """A step function, the reference's schedule for it, how latents look at a level of that schedule's, the objectives
    it is for, and the level at which all is noise.
    """

    run: Callable[[Velocity, mx.array, Sequence[float], Iterator[mx.array]], Iterator[mx.array]]
    schedule: Callable[[int, float], list[float]]
    noised: Callable[[mx.array, mx.array, float], mx.array] = straight
    objectives: tuple[str, ...] = FLOWS
    sigma_max: float = 1.0


SAMPLERS = {
    "pingpong": Sampler(pingpong, log_snr_schedule),
    "euler": Sampler(euler, log_snr_schedule),
    "rk4": Sampler(rk4, linear_schedule),
    "dpmpp": Sampler(dpmpp, log_snr_schedule),
    "dpmpp-3m-sde": Sampler(dpmpp_3m_sde, polyexponential_schedule, added, ("v",), SIGMA_MAX),
    "dpmpp-2m": Sampler(dpmpp_2m, polyexponential_schedule, added, ("v",), SIGMA_MAX),
    "v-ddim": Sampler(v_ddim, linear_schedule, rotated, ("v",)),
}


class Defaults(NamedTuple):
    """What an objective samples with unless told otherwise."""

    sampler: str
    steps: int
    cfg_scale: float


# As the reference's own interface sets them.
DEFAULTS = {
    "rf_denoiser": Defaults("pingpong", 8, 1.0),
    "rectified_flow": Defaults("euler", 50, 7.0),
    "v": Defaults("dpmpp-3m-sde", 100, 7.0),
}


def find_sampler(name: str, objective: str) -> Sampler:
    """The sampler of that name; InputError, naming those of the objective, if it is none of them."""
    known = [known for known, sampler in SAMPLERS.items() if objective in sampler.objectives]
    if name in known:
        return SAMPLERS[name]
    problem = f"{name!r} is not for this model" if name in SAMPLERS else f"unknown sampler {name!r}"
    raise InputError(f"{problem}: the samplers for objective {objective} are {', '.join(known)}")


def sample(
    velocity: Velocity,
    latents: mx.array,
    noise: Iterator[mx.array],
    sampler: str,
    steps: int,
    sigma_max: float | None = None,
) -> Iterator[State]:
    """Yields the state after each step, from latents (B, T, C) at sigma_max to clean ones; at 0, as they are.

    sigma_max is on the scale of the sampler's schedule; by default it is the sampler's own, which is all noise.
    `sampler` is one of SAMPLERS.
    """
    method = SAMPLERS[sampler]
    schedule = method.schedule(steps, method.sigma_max if sigma_max is None else sigma_max)
    if len(schedule) == 1:
        yield State(0, 0, latents)
    for step, x in enumerate(method.run(velocity, latents, schedule, noise), start=1):
        yield State(step, steps, x)


def sample_noise(velocity: Velocity, noise: Iterator[mx.array], sampler: str, steps: int) -> Iterator[State]:
    """`sample` from the first noise, as strong as the sampler wants it."""
    return sample(velocity, SAMPLERS[sampler].sigma_max * next(noise), noise, sampler, steps)


def sample_from(
    velocity: Velocity, latents: mx.array, noise: Iterator[mx.array], sampler: str, steps: int, level: float
) -> Iterator[State]:
    """`sample` from clean latents (B or 1, T, C) with the first noise mixed in, as the reference mixes init audio.

    At level 0 they stay as they are. Level 1 is `sample_noise`, but for samplers over noise levels: even at their
    strongest the reference keeps the latents below the noise.
    """
    return sample(velocity, SAMPLERS[sampler].noised(latents, next(noise), level), noise, sampler, steps, level)


def clip_noise(seeds: Sequence[int], shape: tuple[int, int]) -> Iterator[mx.array]:
    """Endless standard-normal float32 noise (len(seeds), *shape), one key a clip, split at every draw.

    A clip's noise depends on its own seed alone: not on its neighbours, and not on how many draws follow.
    """
    keys = mx.stack([mx.random.key(seed) for seed in seeds])
    split, draw = mx.vmap(mx.random.split), mx.vmap(lambda key: mx.random.normal(shape, key=key))
    while True:
        pairs = split(keys)
        keys = pairs[:, 0]
        yield draw(pairs[:, 1])


def guided(velocity: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance, vu + scale·(vc - vu), of a velocity over two batches: conditional, unconditional."""

    def run(x: mx.array, t: float) -> mx.array:
        conditional, unconditional = mx.split(velocity(mx.concatenate([x, x]), t), 2)
        return unconditional + scale * (conditional - unconditional)

    return run
