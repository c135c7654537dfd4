"""Sampling that starts from sound: init audio and inpainting."""

import builtins
import warnings
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import analysis
from mlx_audio_native import load, read_recipe, sampling
from mlx_audio_native.cli import main
from mlx_audio_native.editing import encode_window, hold, kept_latents
from mlx_audio_native.errors import AudioFileError, InputError, MlxAudioError
from mlx_audio_native.init_audio import read_source

RATE = 1000  # of the small model
# By sampler: a noise level, and what stable-audio-tools 0.0.19's sample_rf or sample_k makes of CLEAN in 4 steps under
# v = x/2 + t, with these noises.
CLEAN = [0.5, -1.0, 2.0]
REFERENCE = {
    "pingpong": (0.7, [-0.5125413, -0.0648392, 0.0471472]),
    "euler": (0.7, [0.3314244, -0.3442778, -0.0843923]),
    "rk4": (0.7, [0.4043014, -0.2827697, -0.0185115]),
    "dpmpp": (0.7, [0.3693995, -0.3122269, -0.0500629]),
    "dpmpp-3m-sde": (5.0, [-0.55846, -0.1390028, 0.2973009]),
    "dpmpp-2m": (5.0, [0.1209585, -0.3613227, -0.43022]),
    "v-ddim": (0.7, [0.1914711, -0.4388398, -0.1147633]),
}
NOISES = [[1.0, 0.25, -0.5], [-0.75, 1.5, 0.1], [0.2, -0.4, 1.25], [-1.1, 0.6, 0.3], [0.7, -0.2, -0.9]]


def tone(seconds, rate=RATE, hertz=110.0, channels=2, level=0.5):
    time = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * hertz * k * time) / k for k in range(1, 4))
    return (level / 2 * np.repeat(wave[:, None], channels, axis=1)).astype(np.float32)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes samples as a file in an empty working directory; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(samples, name="tone.wav", rate=RATE, subtype="FLOAT"):
        soundfile.write(name, samples, rate, subtype=subtype if name.endswith(".wav") else None)
        return name

    return write


@pytest.fixture(scope="module")
def v_model(make_folder):
    return load(make_folder(lambda config: config["model"]["diffusion"].update(diffusion_objective="v")))


def reconstruction(model, samples):
    latents = encode_window(model.autoencoder, samples, model.config.latent_length)
    return np.array(model.autoencoder.decode(latents))[0, : len(samples)]


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_init_latents_are_mixed_and_sampled_as_the_reference_does(sampler):
    level, expected = REFERENCE[sampler]
    noise = (mx.array(values)[None, None] for values in NOISES)
    *_, last = sampling.sample_from(lambda x, t: x / 2 + t, mx.array(CLEAN)[None, None], noise, sampler, 4, level)
    np.testing.assert_allclose(np.array(last.latents).ravel(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["pingpong", "euler", "rk4", "dpmpp"])
def test_noise_level_0_reconstructs_and_1_is_text_to_audio(small_model, write, sampler):
    samples = tone(2.5)
    options = {"prompt": "kick", "seed": 3, "steps": 3, "sampler": sampler, "init_audio": write(samples)}
    least, most = (small_model.generate(**options, noise_level=level) for level in (0, 1))
    expected = reconstruction(small_model, samples)
    np.testing.assert_allclose(least.samples, expected, atol=1e-5 * np.abs(expected).max())
    del options["init_audio"]
    assert np.array_equal(most.samples, small_model.generate(**options, seconds=2.5).samples)


@pytest.mark.parametrize("sampler", ["dpmpp-3m-sde", "dpmpp-2m", "v-ddim"])
def test_init_audio_under_the_objective_v(v_model, write, sampler):
    name = write(tone(2))
    options = {"prompt": "kick", "seed": 3, "steps": 3, "sampler": sampler, "cfg_scale": 3, "init_audio": name}
    least = v_model.generate(**options, noise_level=0).samples
    np.testing.assert_allclose(least, reconstruction(v_model, tone(2)), atol=1e-5 * np.abs(least).max())
    limit = sampling.SAMPLERS[sampler].sigma_max
    assert np.abs(v_model.generate(**options, noise_level=limit).samples - least).max() > 1e-2 * np.abs(least).max()
    with pytest.raises(InputError, match=f"noise_level must be from 0 to {limit:g} with {sampler}"):
        v_model.generate(**options, noise_level=limit + 1)


def test_a_batch_over_one_init_audio_equals_its_clips_alone(small_model, write):
    options = {"init_audio": write(tone(2)), "noise_level": 0.6, "seed": 4, "steps": 3}
    prompts = ["kick", "saw bass lead", "sine"]
    for edit in ({}, {"inpaint": (0.5, 1.5)}):
        together = small_model.generate(prompts, **options, **edit)
        for prompt, clip in zip(prompts, together, strict=True):
            alone = small_model.generate(prompt, **options, **edit)
            assert alone.recipe == clip.recipe
            assert np.linalg.norm(alone.samples - clip.samples) < 1e-4 * np.linalg.norm(alone.samples)


@pytest.mark.parametrize("objective", ["rf_denoiser", "v"])
def test_inpainting_keeps_the_rest_to_the_bit_and_noised_to_every_step(small_model, v_model, write, objective):
    """However few steps there are, and whatever the model says there."""
    model = small_model if objective == "rf_denoiser" else v_model
    name = write(tone(3))
    latents = np.array(encode_window(model.autoencoder, tone(3), 188))
    kept = np.array(kept_latents(model.config, 1.0, 2.0)).ravel()
    assert kept.tolist() == [not 31 <= frame < 63 for frame in range(188)]
    for sampler, entry in sampling.SAMPLERS.items():
        if objective not in entry.objectives:
            continue
        *_, last = model.sample("kick", init_audio=name, inpaint=(1.0, 2.0), seed=1, steps=3, sampler=sampler)
        assert np.array_equal(np.array(last.latents)[:, kept], latents[:, kept])
        assert (np.abs(np.array(last.latents) - latents)[:, ~kept].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("sampler", ["pingpong", "euler", "dpmpp", "dpmpp-2m", "v-ddim"])
def test_what_is_kept_has_the_noise_of_each_step(sampler):
    """The latents that the model is shown, on the sampler's own path, are clean ones and noise of the step's level."""
    entry, seen = sampling.SAMPLERS[sampler], []
    clean, kept = mx.array([[[1.0], [2.0]]]), mx.array([[True], [False]])
    noise = (mx.full((1, 2, 1), 0.5) for _ in range(9))

    def velocity(x, t):
        seen.append((t, x[0, 0, 0].item()))
        return 0 * x

    held = hold(velocity, clean, kept, entry.objectives[0])
    list(sampling.sample_from(held, clean, noise, sampler, 6, entry.sigma_max))
    assert len(seen) == 6
    for t, x in seen:
        angle = t * np.pi / 2
        clean_part, noise_part = (1 - t, t) if entry.objectives == sampling.FLOWS else (np.cos(angle), np.sin(angle))
        assert x == pytest.approx(clean_part * 1.0 + noise_part * 0.5, abs=1e-4)


def test_inpainting_past_the_end_makes_the_clip_longer(small_model, write):
    clip = small_model.generate("kick", init_audio=write(tone(2)), inpaint=(2, 4), steps=2)
    assert clip.recipe.seconds == 4 and len(clip.samples) == 4000
    assert (clip.recipe.inpaint, clip.recipe.noise_level) == ((2, 4), 1)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.aiff"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_any_file_with_any_channels(write, name, channels):
    source = read_source(write(tone(2, 44100, channels=channels), name, 44100), 44100, 2, 100_000)
    assert source.samples.shape == (88200, 2) and source.samples.dtype == np.float32 and source.name == name
    np.testing.assert_allclose(source.samples, tone(2, 44100), atol=0.05)


@pytest.mark.parametrize("rate", [8000, 22050, 48000, 96000])
def test_other_rates_are_resampled(write, rate):
    source = read_source(write(tone(2, rate), rate=rate), 44100, 2, 100_000)
    assert abs(len(source.samples) - 88200) <= 1
    middle = slice(2000, 80000)
    np.testing.assert_allclose(source.samples[middle], tone(2, 44100)[middle], atol=1e-3)


def test_a_model_with_one_channel_hears_the_mean(write):
    stereo = np.concatenate([tone(1, channels=1), 0 * tone(1, channels=1)], axis=1)
    np.testing.assert_allclose(read_source(write(stereo), RATE, 1, 6016).samples, tone(1, channels=1) / 2, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 1e-4, 1.0])
def test_silent_and_quiet_files_stay_as_they_are(small_model, write, level):
    name = write(tone(1, level=level))
    assert np.array_equal(read_source(name, RATE, 2, 6016).samples, tone(1, level=level))
    assert np.isfinite(small_model.generate("kick", init_audio=name, steps=1).samples).all()


def test_a_loud_file_is_scaled_to_1(write):
    with pytest.warns(UserWarning, match="tone.wav peaks at .* scaled down to 1"):
        source = read_source(write(tone(1, level=50.0)), RATE, 2, 6016)
    assert np.abs(source.samples).max() == pytest.approx(1)


def test_longer_than_the_window_is_an_error_or_trimmed(small_model, write):
    name = write(tone(7))
    with pytest.raises(AudioFileError, match=r"has 7\.000 s, and the window of this model 6\.016 s"):
        small_model.generate("kick", init_audio=name)
    clip = small_model.generate("kick", init_audio=name, trim=True, noise_level=0)
    expected = reconstruction(small_model, tone(7)[:6016])
    np.testing.assert_allclose(clip.samples, expected, atol=1e-5 * np.abs(expected).max())


def test_what_is_no_audio_is_one_sentence(write, tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    write(np.zeros((0, 2)), "empty.wav")
    write(np.full((10, 2), np.nan), "nan.wav")
    (tmp_path / "headless.raw").write_bytes(bytes(400))
    for name in ("missing.wav", "text.wav", "headless.raw", "empty.wav", "nan.wav", str(tmp_path)):
        with pytest.raises(AudioFileError) as caught:
            read_source(name, RATE, 2, 6016)
        assert "\n" not in str(caught.value)
    with pytest.raises(AudioFileError, match=r"cannot read missing\.wav: No such file or directory$"):
        read_source("missing.wav", RATE, 2, 6016)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_file_gives_samples_or_an_error(tmp_path_factory, data):
    name = data.draw(st.sampled_from(["a.wav", "a.flac", "a.aiff", "a.ogg"]))
    path = tmp_path_factory.mktemp("damaged") / name
    soundfile.write(path, tone(0.1), RATE * 8)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, min(len(content) - 1, 100)))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            source = read_source(path, RATE, 2, 6016, trim=True)
        except MlxAudioError as error:
            assert "\n" not in str(error)
        else:
            assert 0 < len(source.samples) <= 6016 and np.abs(source.samples).max() < 2


def test_without_soxr_only_another_rate_is_refused(write, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "soxr":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    name = write(tone(1))
    assert len(read_source(name, RATE, 2, 6016).samples) == 1000
    with pytest.raises(InputError, match=r"1000 Hz and the model 44100: .*'\.\[audio\]'"):
        read_source(name, 44100, 2, 100_000)


# --- requests and recipes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"noise_level": -0.1}, "noise_level must be from 0 to 1 with pingpong"),
        ({"noise_level": float("nan")}, "noise_level must be a finite number"),
        ({"inpaint": 1.0}, "inpaint must be a start and an end"),
        ({"inpaint": (1.0,)}, "inpaint must be a start and an end"),
        ({"inpaint": (2.0, 1.0)}, r"within 0 and 6\.016"),
        ({"inpaint": (-1.0, 1.0)}, r"within 0 and 6\.016"),
        ({"inpaint": (1.0, 6.1)}, r"within 0 and 6\.016"),
        ({"inpaint": (1.5, 2.0), "seconds": 1}, "inpaint starts at 1.5 s, but the clip ends at 1"),
        ({"seconds": 7}, r"fits the window of this model, 6\.016 s, not 7"),
        ({"init_audio": None, "noise_level": 0.5}, "noise_level is about init audio, and there is none"),
        ({"init_audio": None, "inpaint": (1, 2)}, "inpaint is about init audio, and there is none"),
    ],
)
def test_a_wrong_edit_is_one_sentence(small_model, write, options, problem):
    with pytest.raises(InputError, match=problem):
        small_model.generate(**{"prompt": "kick", "init_audio": write(tone(2))} | options)


def test_a_clip_is_init_audio_too(small_model):
    first = small_model.generate("sine", seconds=1, steps=1, seed=0)
    first.samples[:] = tone(1)
    clip = small_model.generate("kick", init_audio=first, noise_level=0)
    expected = reconstruction(small_model, tone(1))
    np.testing.assert_allclose(clip.samples, expected, atol=1e-5 * np.abs(expected).max())


def test_a_recipe_asks_for_its_init_audio_and_makes_the_clip_again(small_folder, write, tmp_path, capsys):
    name, model = write(tone(2)), ["--model", str(small_folder)]
    edit = ["--init-audio", name, "--noise-level", "0.6", "--inpaint", "0.5,1.5"]
    assert main(["generate", "kick", *edit, "--seed", "1", "--steps", "2", "--output", "a.wav", *model]) == 0
    recipe = read_recipe("a.wav")
    assert (recipe.init_audio, recipe.noise_level, recipe.inpaint) == (name, 0.6, (0.5, 1.5))
    capsys.readouterr()
    assert main(["generate", "--from", "a.wav", "--output", "b.wav", *model]) == 1
    assert capsys.readouterr().err == "error: a.wav was made from 'tone.wav': give that file with --init-audio\n"
    again = ["generate", "--from", "a.wav", "--overwrite", "--output", "b.wav", *model, "--init-audio"]
    assert main([*again, name]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    write(tone(2, hertz=150), "other.wav")
    assert main([*again, "other.wav"]) == 0
    assert capsys.readouterr().err == "warning: a.wav was made from another file than other.wav\n"


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b"])
def test_a_wrong_stretch_is_a_wrong_command_line(text, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "kick", "--inpaint", text])
    assert "give a start and an end in seconds" in capsys.readouterr().err


# --- the embedded model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return load()


def spectrogram(samples):
    power, _ = analysis._spectrogram(analysis.mono(samples), 2048, 1024)
    return np.log1p(100 * np.sqrt(power)).ravel()


def test_the_more_noise_the_less_is_left_of_the_source(demo, write):
    name = write(tone(3, 44100), rate=44100)
    source, likeness = spectrogram(reconstruction(demo, tone(3, 44100))), []
    drums = ["kick drum loop, 120 BPM", "hi-hat loop, 90 BPM"]
    for level in (0, 0.3, 0.6, 1):  # from about 0.75 on nothing is left, and chance decides
        clips = demo.generate(drums, init_audio=name, noise_level=level, steps=4, seed=0)
        likeness.append(np.mean([np.corrcoef(source, spectrogram(clip.samples))[0, 1] for clip in clips]))
    assert likeness[0] > 0.999
    assert all(more > less for more, less in pairwise(likeness)), likeness


def test_inpainting_follows_the_prompt_and_leaves_the_rest(demo, write):
    rate, samples = 44100, tone(5.9, 44100)
    clip = demo.generate(
        "kick drum loop, 120 BPM", init_audio=write(samples, rate=rate), inpaint=(1, 5), seed=0
    ).samples
    own = reconstruction(demo, samples)
    for kept in (slice(0, round(0.7 * rate)), slice(round(5.3 * rate), None)):  # the decoder hears 0.2 s around
        np.testing.assert_allclose(clip[kept], own[kept], atol=1e-4)
    filled = clip[round(1.1 * rate) : round(4.9 * rate)]
    assert analysis.instrument(filled) == "kick"
    assert abs(analysis.tempo(filled, "kick") / 120 - 1) < 0.03
