"""Clips longer than the window, and loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden import analysis
from mlx_audio_native import load, read_recipe
from mlx_audio_native.cli import main
from mlx_audio_native.errors import InputError
from mlx_audio_native.request import check_request
from mlx_audio_native.windows import blend, close_loop, window_starts

WINDOW = 6016  # of the small model, at 1 kHz


@given(frames=st.integers(1, 100_000), bpm=st.none() | st.floats(1, 1000))
def test_windows_overlap_until_the_last_holds_the_end(small_model, frames, bpm):
    starts = window_starts(small_model.config, frames, bpm)
    assert starts[0] == 0 and starts[-1] + WINDOW >= frames
    assert all(start + WINDOW < frames for start in starts[:-1])
    for number, start in enumerate(starts):
        if number:
            assert 0.24 * WINDOW <= starts[number - 1] + WINDOW - start < WINDOW
        if bpm is not None and 60 / bpm <= 4.5:  # a beat that fits
            beats = start / 1000 * bpm / 60
            assert abs(beats - round(beats)) * 60 / bpm * 1000 <= 0.5 + 1e-6


@pytest.mark.parametrize("seconds", [6.017, 12, 20.5])
@pytest.mark.parametrize("prompt", ["saw bass lead", "kick drum loop, 120 BPM"])
def test_longer_clips_have_the_length_asked_for(small_model, prompt, seconds):
    clip = small_model.generate(prompt, seconds=seconds, seed=1, steps=2)
    assert clip.samples.shape == (round(seconds * 1000), 2) and clip.samples.dtype == np.float32
    assert clip.recipe.seconds == seconds
    assert np.array_equal(small_model.generate(prompt, seconds=seconds, seed=1, steps=2).samples, clip.samples)


def test_a_longer_clip_starts_as_its_first_window_alone(small_model):
    clip = small_model.generate("saw", seconds=15, seed=1, steps=2)
    first = small_model.generate("saw", seconds=6.016, seed=1, steps=2)
    same = window_starts(small_model.config, 15_000, None)[1]
    assert np.array_equal(clip.samples[:same], first.samples[:same])
    windows = [clip.samples[start : start + 3000] for start in (0, 5000, 10_000)]
    assert not np.allclose(windows[0], windows[1]) and not np.allclose(windows[1], windows[2])


def test_a_batch_with_long_clips_equals_its_clips_alone(small_model):
    together = small_model.generate(["kick", "saw"], seconds=[2, 9], seed=[1, 2], steps=2)
    for clip in together:
        recipe = clip.recipe
        alone = small_model.generate(recipe.prompt, seconds=recipe.seconds, seed=recipe.seed, steps=2)
        assert np.array_equal(alone.samples, clip.samples)


def test_a_window_too_short_to_go_on_from_is_said(make_folder):
    model = load(make_folder(lambda config: config.update(sample_size=15 * 32)))
    assert len(model.generate("kick", seconds=0.48, steps=1).samples) == 480
    with pytest.raises(InputError, match=r"must fit the window of this model, 0\.480 s"):
        model.generate("kick", seconds=1, steps=1)


@pytest.mark.parametrize("tempo", ["0", "0.5", "1001", "9" * 400])
def test_a_tempo_that_cannot_be_is_none(small_model, tempo):
    assert len(small_model.generate(f"kick, {tempo} BPM", seconds=7, steps=1).samples) == 7000


def test_sample_yields_one_window(small_model):
    with pytest.raises(InputError, match=r"must fit the window of this model, 6\.016 s"):
        small_model.sample("kick", seconds=7)


# --- loops ----------------------------------------------------------------------------------------------------------


def test_a_loop_is_made_again_from_its_recipe(small_model):
    clip = small_model.generate("kick", bars=1, bpm=123.4567, seed=0, steps=1)
    assert clip.recipe.prompt == "kick, 123.4567 BPM"
    assert np.array_equal(small_model.generate(**clip.recipe.options()).samples, clip.samples)


@pytest.mark.parametrize(("bars", "bpm"), [(1, 97), (2, 120), (2, 133.3), (4, 120), (3, 60)])
def test_loops_have_the_exact_length(small_model, bars, bpm):
    clip = small_model.generate("kick", bars=bars, bpm=bpm, seed=0, steps=1)
    assert len(clip.samples) == round(bars * 4 * 60 / bpm * 1000)
    assert (clip.recipe.prompt, clip.recipe.bars, clip.recipe.bpm) == (f"kick, {bpm:g} BPM", bars, bpm)
    assert clip.recipe.seconds == bars * 4 * 60 / bpm


def test_the_tempo_may_stand_in_the_prompt(small_model):
    clips = small_model.generate(["snare loop, 90bpm", "120 BPM kick"], bars=1, steps=1)
    assert [(clip.recipe.bpm, clip.recipe.prompt) for clip in clips] == [
        (90, "snare loop, 90bpm"),
        (120, "120 BPM kick"),
    ]
    assert [len(clip.samples) for clip in clips] == [2667, 2000]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bars": 2}, "a loop takes a tempo"),
        ({"bars": 0, "bpm": 120}, "bars must be from 1"),
        ({"bars": 1.5, "bpm": 120}, "bars must be a whole number"),
        ({"bars": 2, "bpm": 0}, "bpm must be from 1 to 1000"),
        ({"bars": 2, "bpm": float("nan")}, "bpm must be a finite number"),
        ({"bars": 2, "bpm": 120, "seconds": 4}, "bars or seconds, not both"),
        ({"bpm": 120}, "bpm is about a loop: give bars too"),
        ({"prompt": "kick, 100 BPM", "bars": 2, "bpm": 120}, "the prompt names 100 BPM, and bpm is 120"),
        ({"bars": 10_000, "bpm": 120}, "seconds must be at most 3600"),
    ],
)
def test_a_wrong_loop_is_one_sentence(small_model, options, problem):
    with pytest.raises(InputError, match=problem):
        small_model.generate(**{"prompt": "kick"} | options)


@given(
    st.integers(1, 3000),
    st.integers(1, 200),
    st.integers(100, 48000),
)
def test_the_step_across_a_loops_seam_is_one_of_the_signal(frames, tail, rate):
    samples = np.random.default_rng(frames).standard_normal((frames + tail, 2)).astype(np.float32)
    loop = close_loop(samples, frames, rate)
    assert loop.shape == (frames, 2)
    blended = min(round(0.01 * rate), frames, tail)
    assert np.array_equal(loop[0], samples[frames])
    assert np.array_equal(loop[blended:], samples[blended:frames])
    if frames > blended:
        assert np.array_equal(loop[-1], samples[frames - 1])


def test_blending_equals_is_no_change():
    samples = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    assert np.array_equal(blend(samples, samples), samples)


def test_the_model_is_told_more_than_the_loop_lasts(small_model):
    (clip,) = check_request(small_model.config, "kick", bars=2, bpm=120).clips
    assert (clip.seconds, clip.frames, clip.made) == (4, 4000, 4100) and clip.told == pytest.approx(4.1)


def test_from_makes_a_loop_again(small_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(small_folder)]
    loop = ["--bars", "1", "--bpm", "120", "--steps", "2", "--output", "a.wav"]
    assert main(["generate", "kick", *loop, *model]) == 0
    assert main(["generate", "--from", "a.wav", "--output", "b.wav", *model]) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert main(["generate", "--from", "a.wav", "--bars", "2", "--output", "c.wav", *model]) == 0
    assert (read_recipe("c.wav").bars, read_recipe("c.wav").seconds) == (2, 4)


# --- the embedded model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return load()


def test_loops_of_the_embedded_model_repeat_without_a_click(demo):
    clips = demo.generate(["kick drum loop, 120 BPM", "hi-hat loop, 120 BPM"], bars=2, seed=[0, 1])
    for clip, kind in zip(clips, ("kick", "hat"), strict=True):
        samples = clip.samples
        assert len(samples) == 4 * 44100
        inside = np.abs(np.diff(samples, axis=0)).max()
        assert np.abs(samples[0] - samples[-1]).max() <= inside
        assert abs(analysis.tempo(np.concatenate([samples, samples]), kind) / 120 - 1) < 0.03


def test_a_longer_clip_of_the_embedded_model_has_no_audible_joint(demo):
    """Nor gap: the beat goes on in tempo, every beat about as loud, and no step at the joint stands out."""
    clip, rate = demo.generate("kick drum loop, 120 BPM", seconds=9.9, seed=0).samples, 44100
    assert abs(analysis.tempo(clip, "kick") / 120 - 1) < 0.02
    beats = 10 * np.log10(
        [np.square(clip[start : start + rate // 2]).mean() for start in range(0, 9 * rate, rate // 2)]
    )
    assert np.abs(beats - np.median(beats)).max() < 6
    steps = np.abs(np.diff(clip, axis=0)).max(axis=1)
    _, start = window_starts(demo.config, len(clip), 120)
    window, ratio = demo.config.sample_size, demo.config.downsampling_ratio
    joint = start + ((window - start) // ratio - 4) * ratio  # where it goes over into what the second window made
    inside = slice(joint - ratio, joint + ratio)
    assert steps[inside].max() <= max(steps[: inside.start].max(), steps[inside.stop :].max())
