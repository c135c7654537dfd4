"""Schedules, samplers, noise and guidance, without a model."""

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_audio_native import sampling
from mlx_audio_native.errors import InputError

STEPS = st.integers(1, 1000)
SHAPE = (2, 5, 3)


def final(sampler: str, velocity, x: mx.array, steps: int, noise=None, sigma_max: float = 1.0) -> np.ndarray:
    *_, state = sampling.sample(velocity, x, noise, sampler, steps, sigma_max)
    return np.array(state.latents)


def reference_schedule(steps: int, sigma_max: float) -> np.ndarray:
    """0.0.19's own lines, in NumPy."""
    start = math.log(((1 - sigma_max) / sigma_max) + 1e-6) if sigma_max < 1 else -6
    t = 1 / (1 + np.exp(np.linspace(start, 2, steps + 1)))
    t[0], t[-1] = sigma_max, 0
    return t


def test_eight_steps_are_the_published_figures():
    expected = [1, 0.9933071, 0.9820138, 0.9525741, 0.8807971, 0.7310586, 0.5, 0.2689414, 0]
    np.testing.assert_allclose(sampling.log_snr_schedule(8), expected, atol=5e-8)


@given(STEPS, st.floats(0, 1, exclude_min=True, allow_subnormal=False))
@pytest.mark.parametrize("schedule", [sampling.log_snr_schedule, sampling.linear_schedule])
def test_schedules_fall_strictly_from_sigma_max_to_zero(schedule, steps, sigma_max):
    times = schedule(steps, sigma_max)
    assert len(times) == steps + 1
    assert times[0] == sigma_max and times[-1] == 0
    assert all(t > t_next for t, t_next in pairwise(times))


@given(STEPS, st.floats(0.1193, 1))
def test_schedule_equals_the_reference_where_that_falls(steps, sigma_max):
    np.testing.assert_allclose(
        sampling.log_snr_schedule(steps, sigma_max), reference_schedule(steps, sigma_max), atol=1e-12
    )


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_at_sigma_zero_latents_stay_unsampled(sampler):
    latents = mx.random.normal(SHAPE)
    (state,) = sampling.sample(None, latents, iter(()), sampler, 8, sigma_max=0.0)
    assert state.step == state.steps == 0
    assert mx.array_equal(state.latents, latents)


@pytest.mark.parametrize("sampler", ["pingpong", "euler", "dpmpp"])
@given(steps=st.integers(1, 12), sigma_max=st.floats(0.01, 1))
def test_field_towards_one_point_ends_there(sampler, steps, sigma_max):
    """v = (x - c) / t says c is the clean latents, from wherever x stands."""
    clean = mx.array(np.random.default_rng(steps).standard_normal(SHAPE), dtype=mx.float32)
    noise = sampling.clip_noise([1, 2], SHAPE[1:])
    start = (1 - sigma_max) * clean + sigma_max * next(noise)
    result = final(sampler, lambda x, t: (x - clean) / t, start, steps, noise, sigma_max)
    np.testing.assert_allclose(result, clean, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "rk4", "dpmpp"])
@given(steps=st.integers(1, 12), sigma_max=st.floats(0.01, 1))
def test_constant_velocity_is_integrated_exactly(sampler, steps, sigma_max):
    result = final(sampler, lambda x, t: mx.full(SHAPE, 3.0), mx.ones(SHAPE), steps, sigma_max=sigma_max)
    np.testing.assert_allclose(result, 1 - 3 * sigma_max, atol=1e-5)


@pytest.mark.parametrize(("sampler", "steps", "ratio"), [("euler", 32, 0.6), ("dpmpp", 32, 0.35), ("rk4", 4, 0.12)])
def test_order_of_convergence_on_gaussian_data(sampler, steps, ratio):
    """Data ~ N(m, s²): x(t) = (1 - t)·m + sqrt((1 - t)²s² + t²)·x(1) solves the flow; half the step, less error."""
    mean, deviation = 0.7, 0.5
    start = mx.array(np.random.default_rng(0).standard_normal(SHAPE), dtype=mx.float32)

    def velocity(x, t):
        slope = (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)
        return slope * (x - (1 - t) * mean) - mean

    def error(steps):
        *_, result = sampling.SAMPLERS[sampler].run(velocity, start, sampling.linear_schedule(steps), iter(()))
        return np.abs(np.array(result - (mean + deviation * start))).max()

    assert error(2 * steps) < ratio * error(steps)


def test_pingpong_takes_fresh_noise_at_every_step_but_the_last():
    drawn = [mx.full(SHAPE, float(value)) for value in (10, 20, 30)]
    clean = mx.zeros(SHAPE)
    states = list(sampling.sample(lambda x, t: (x - clean) / t, mx.ones(SHAPE), iter(drawn), "pingpong", 4))
    times = sampling.log_snr_schedule(4)
    for state, t, value in zip(states, times[1:], [10, 20, 30, 0], strict=True):
        np.testing.assert_allclose(np.array(state.latents), t * value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_states_count_the_steps(sampler):
    noise = sampling.clip_noise([0, 1], SHAPE[1:])
    states = list(sampling.sample(lambda x, t: 0.1 * x, next(noise), noise, sampler, 5))
    assert [(state.step, state.steps) for state in states] == [(i, 5) for i in range(1, 6)]


def test_noise_of_a_clip_depends_on_its_seed_alone():
    alone, batch = sampling.clip_noise([7], (6, 4)), sampling.clip_noise([3, 7, 2**64 - 1], (6, 4))
    draws = [(next(alone), next(batch)) for _ in range(4)]
    for single, many in draws:
        assert mx.array_equal(single[0], many[1])
        assert not mx.array_equal(many[0], many[1])
    assert not mx.array_equal(draws[0][0], draws[1][0])
    values = np.array(next(sampling.clip_noise([0], (500, 64))))
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02


def test_unknown_sampler_names_the_known_ones():
    with pytest.raises(InputError, match=r"unknown sampler 'ddim'.*pingpong, euler, rk4, dpmpp"):
        sampling.find_sampler("ddim")


def test_unknown_objective_has_no_defaults():
    with pytest.raises(InputError, match="objective 'v'"):
        sampling.find_defaults("v")


def test_guidance_weighs_the_two_halves():
    def velocity(x, t):
        assert x.shape[0] == 4
        return x + mx.array([10.0, 20.0, 1.0, 2.0])[:, None, None]

    latents = mx.array([100.0, 200.0])[:, None, None]
    for scale, expected in ((0.0, [101.0, 202.0]), (1.0, [110.0, 220.0]), (3.0, [128.0, 256.0])):
        assert sampling.guided(velocity, scale)(latents, 0.5).flatten().tolist() == expected
