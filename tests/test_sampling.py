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
FLOW = [name for name, sampler in sampling.SAMPLERS.items() if sampler.objectives == sampling.FLOWS]
V = [name for name, sampler in sampling.SAMPLERS.items() if sampler.objectives == ("v",)]


def final(sampler: str, velocity, x: mx.array, steps: int, noise=None, sigma_max: float | None = None) -> np.ndarray:
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


def test_eight_noise_levels_are_those_of_k_diffusion():
    """k_diffusion.sampling.get_sigmas_polyexponential(8, 0.3, 500, 1.0), in float32 as it is there."""
    expected = [500.00006, 173.26305, 60.040157, 20.805468, 7.2096419, 2.4983282, 0.86573577, 0.29999998, 0]
    np.testing.assert_allclose(sampling.polyexponential_schedule(8), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["log_snr_schedule", "linear_schedule", "polyexponential_schedule"])
@given(data=st.data(), steps=STEPS)
def test_schedules_fall_strictly_from_sigma_max_to_zero(schedule, data, steps):
    largest = 1000 if schedule == "polyexponential_schedule" else 1
    sigma_max = data.draw(st.floats(0, largest, exclude_min=True, allow_subnormal=False))
    schedule = getattr(sampling, schedule)
    times = schedule(steps, sigma_max)
    assert len(times) == steps + 1
    assert times[0] == sigma_max and times[-1] == 0
    assert all(t > t_next for t, t_next in pairwise(times))


@given(STEPS, st.floats(0.1193, 1))
def test_schedule_equals_the_reference_where_that_falls(steps, sigma_max):
    np.testing.assert_allclose(
        sampling.log_snr_schedule(steps, sigma_max), reference_schedule(steps, sigma_max), atol=1e-12
    )


@given(st.integers(2, 1000), st.floats(0.3003, 1000, exclude_min=True))
def test_noise_levels_equal_k_diffusions_where_those_fall(steps, sigma_max):
    ramp = np.linspace(1, 0, steps)
    sigmas = np.exp(ramp * (math.log(sigma_max) - math.log(0.3)) + math.log(0.3))
    np.testing.assert_allclose(sampling.polyexponential_schedule(steps, sigma_max), [*sigmas, 0], rtol=1e-12)


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


def linear_v(deviation: float, mean: float = 0.0):
    """The exact velocity of data ~ N(mean, deviation²) under the objective v."""

    def velocity(x, t):
        clean, noise = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
        score = (x - clean * mean) / (clean**2 * deviation**2 + noise**2)
        return clean * noise * score - noise * (mean + clean * deviation**2 * score)

    return velocity


@given(st.floats(-3, 3), st.floats(0.1, 3), st.floats(0.01, 500))
def test_denoising_is_the_posterior_mean_of_gaussian_data(mean, deviation, sigma):
    x = mx.array(np.random.default_rng(0).standard_normal(SHAPE) * sigma + mean, dtype=mx.float32)
    expected = mean + deviation**2 / (deviation**2 + sigma**2) * (np.array(x, dtype=np.float64) - mean)
    found = np.array(sampling.denoise(linear_v(deviation, mean), x, sigma))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("sampler", V)
@given(steps=st.integers(1, 12), value=st.floats(-3, 3))
def test_data_that_is_one_point_is_found_from_pure_noise(sampler, steps, value):
    noise = sampling.clip_noise([1, 2], SHAPE[1:])
    *_, last = sampling.sample_noise(linear_v(0.0, value), noise, sampler, steps)
    np.testing.assert_allclose(np.array(last.latents), value, atol=1e-5)


@pytest.mark.parametrize(("sampler", "ratio"), [("v-ddim", 0.6), ("dpmpp-2m", 0.35)])
def test_order_of_convergence_of_the_objective_v(sampler, ratio):
    """Data ~ N(m, s²): x(σ) - m keeps its ratio to sqrt(s² + σ²); dpmpp-2m denoises the last level in one step."""
    mean, deviation = 0.7, 0.5
    method = sampling.SAMPLERS[sampler]
    start = method.sigma_max * np.random.default_rng(0).standard_normal(SHAPE)
    if sampler == "v-ddim":
        solution = mean + deviation * start
    else:
        lowest = deviation**2 + sampling.SIGMA_MIN**2
        kept = math.sqrt(lowest / (deviation**2 + method.sigma_max**2))
        solution = mean + deviation**2 / lowest * kept * (start - mean)

    def error(steps):
        return np.abs(final(sampler, linear_v(deviation, mean), mx.array(start, mx.float32), steps) - solution).max()

    assert 1e-4 < error(64) < ratio * error(32)


def weights(deviation: float, steps: int) -> list[np.ndarray]:
    """How much of each independent noise is in a latent of linear dynamics, after each step of dpmpp-3m-sde."""
    units = (mx.array(unit, mx.float32)[None, :, None] for unit in np.eye(steps + 1))
    states = sampling.sample_noise(linear_v(deviation), units, "dpmpp-3m-sde", steps)
    return [np.array(state.latents, dtype=np.float64).ravel() for state in states]


@given(st.integers(1, 40))
def test_stochastic_latents_are_as_noisy_as_the_schedule_says(steps):
    """Around data that is one point; the last, clean, holds no noise."""
    found = [np.square(weight).sum() ** 0.5 for weight in weights(0.0, steps)]
    np.testing.assert_allclose(found, sampling.polyexponential_schedule(steps)[1:], rtol=1e-5, atol=1e-5)


def test_stochastic_sampling_has_the_variance_of_gaussian_data():
    """Of data ~ N(0, s²), denoised from the lowest level: s⁴ / (s² + σ²). Half the step, a quarter of the error."""
    deviation = 0.5
    variance = deviation**4 / (deviation**2 + sampling.SIGMA_MIN**2)
    errors = [abs(np.square(weights(deviation, steps)[-1]).sum() / variance - 1) for steps in (25, 50, 100)]
    assert errors[2] < 1e-3 and errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4


def test_every_step_but_the_last_draws_one_noise():
    for sampler, drawn in (("dpmpp-3m-sde", 6), ("dpmpp-2m", 1), ("v-ddim", 1)):
        noise = iter([mx.ones(SHAPE)] * 10)
        list(sampling.sample_noise(linear_v(0.5), noise, sampler, 6))
        assert len(list(noise)) == 10 - drawn


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


def test_an_objective_takes_its_own_samplers_and_names_them():
    for objective, own in (("rectified_flow", FLOW), ("rf_denoiser", FLOW), ("v", V)):
        assert sampling.DEFAULTS[objective].sampler in own
        for name in [*sampling.SAMPLERS, "ddim"]:
            if name in own:
                assert sampling.find_sampler(name, objective) is sampling.SAMPLERS[name]
                continue
            with pytest.raises(InputError, match=f"{objective} are {', '.join(own)}$") as caught:
                sampling.find_sampler(name, objective)
            assert str(caught.value).startswith("unknown sampler 'ddim'" if name == "ddim" else f"{name!r} is not for")


def test_guidance_weighs_the_two_halves():
    def velocity(x, t):
        assert x.shape[0] == 4
        return x + mx.array([10.0, 20.0, 1.0, 2.0])[:, None, None]

    latents = mx.array([100.0, 200.0])[:, None, None]
    for scale, expected in ((0.0, [101.0, 202.0]), (1.0, [110.0, 220.0]), (3.0, [128.0, 256.0])):
        assert sampling.guided(velocity, scale)(latents, 0.5).flatten().tolist() == expected
