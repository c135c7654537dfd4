"""Properties of the whole: what a clip, a latent frame or a token gets does not depend on what shares its batch."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_audio_native import Model, load

PROMPTS = ("kick", "a snare drum, 120 BPM", "rising sine tone", "saw bass C")
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def model(make_folder) -> Model:
    """rectified_flow: made for guidance, so that its scale is no cause for a warning."""
    return load(make_folder(lambda config: config["model"]["diffusion"].update(diffusion_objective="rectified_flow")))


def off(found: mx.array | np.ndarray, expected: mx.array | np.ndarray) -> float:
    """Relative rms."""
    found, expected = np.array(found, np.float64), np.array(expected, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[mx.array]:
    rng = np.random.default_rng(seed)
    return [mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


@settings(max_examples=8)
@given(
    clips=st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.floats(0.01, 6.0), st.integers(0, 2**31)), min_size=2, max_size=3
    ),
    sampler=st.sampled_from(["pingpong", "euler", "rk4", "dpmpp"]),
    cfg_scale=st.sampled_from([1.0, 3.0]),
)
def test_a_clip_of_any_batch_is_the_clip_alone(model, clips, sampler, cfg_scale):
    options = {"steps": 2, "sampler": sampler, "cfg_scale": cfg_scale}
    prompts, seconds, own_seeds = map(list, zip(*clips, strict=True))
    together = model.generate(prompts, seconds=seconds, seed=own_seeds, **options)
    for (prompt, length, seed), clip in zip(clips, together, strict=True):
        alone = model.generate(prompt, seconds=length, seed=seed, **options)
        assert alone.recipe == clip.recipe
        assert off(clip.samples, alone.samples) < 1e-4


@settings(max_examples=30)
@given(batch=st.integers(2, 5), frames=st.integers(1, 60), tokens=st.integers(1, 70), seed=seeds)
def test_a_velocity_of_any_batch_is_the_velocity_alone(model, batch, frames, tokens, seed):
    latents, cross, global_cond, t = normal(seed, (batch, frames, 8), (batch, tokens, 32), (batch, 32), (batch,))
    t = mx.sigmoid(t)
    together = model.dit(latents, t, cross, global_cond)
    for row in range(batch):
        one = slice(row, row + 1)
        assert off(together[one], model.dit(latents[one], t[one], cross[one], global_cond[one])) < 5e-6


@settings(max_examples=20)
@given(batch=st.integers(2, 4), frames=st.integers(1, 12), seed=seeds)
def test_audio_of_any_batch_is_the_audio_alone_and_back(model, batch, frames, seed):
    (latents,) = normal(seed, (batch, frames, 8))
    audio = model.autoencoder.decode(latents)
    assert audio.shape == (batch, 32 * frames, 2)
    encoded = model.autoencoder.encode(audio)
    assert encoded.shape == latents.shape
    for row in range(batch):
        one = slice(row, row + 1)
        assert off(audio[one], model.autoencoder.decode(latents[one])) < 1e-5
        assert off(encoded[one], model.autoencoder.encode(audio[one])) < 1e-5
