"""Pictures of sound show what is there, and bad files end in a sentence."""

import builtins
import sys

import numpy as np
import pytest
import soundfile

from mlx_audio_native.cli import main
from mlx_audio_native.errors import AudioFileError, InputError
from mlx_audio_native.plot import envelope, plot_file, spectrogram

RATE = 8000


def sine(frequency, seconds=1.0):
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)


@pytest.mark.parametrize("frequency", [250, 1000, 3500])
def test_a_sine_is_brightest_at_its_frequency(frequency):
    picture = spectrogram(sine(frequency))
    peaks = picture.argmax(axis=0) * (RATE / 2) / (len(picture) - 1)
    assert np.abs(peaks - frequency).max() <= RATE / 2 / (len(picture) - 1)
    assert picture.max() == 0 and picture.min() >= -90


def test_silence_after_a_sound_is_dark():
    picture = spectrogram(np.concatenate([sine(1000), np.zeros(RATE)]))
    columns = picture.shape[1]
    assert picture[:, : columns // 3].max() == pytest.approx(0, abs=1) and picture[:, -columns // 3 :].max() == -90


@pytest.mark.parametrize("frames", [1, 2, 3, 1599, 1601, 50_000])
def test_envelope_holds_every_sample_between(frames):
    samples = np.random.default_rng(0).normal(size=(frames, 2))
    low, high = envelope(samples)
    assert len(low) == min(frames, 1600)
    assert np.array_equal(low.min(axis=0), samples.min(axis=0))
    assert np.array_equal(high.max(axis=0), samples.max(axis=0))


@pytest.mark.parametrize("frames", [1, 2, 5, 4000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_length_is_drawn(tmp_path, frames, channels):
    soundfile.write(tmp_path / "a.wav", np.zeros((frames, channels)), RATE)
    plot_file(tmp_path / "a.wav", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.wav"]


def test_info_draws_a_clip(small_model, tmp_path, capsys):
    clip, picture = str(tmp_path / "a.wav"), str(tmp_path / "a.png")
    small_model.generate("kick", seconds=1, steps=1, seed=0).save(clip)
    assert main(["info", clip, "--plot", picture]) == 0
    told = capsys.readouterr().out
    assert "'kick'" in told and told.endswith(f"{picture}: written\n")
    first = (tmp_path / "a.png").read_bytes()
    assert main(["info", clip, "--plot", picture]) == 1
    assert "it exists, and is kept" in capsys.readouterr().err
    assert main(["info", clip, "--plot", picture, "--overwrite"]) == 0
    assert (tmp_path / "a.png").read_bytes() == first
    assert main(["info", str(tmp_path), "--plot", picture]) == 1


@pytest.mark.parametrize("content", [b"", b"RIFF\0\0\0\0WAVE", b"text", np.zeros(100, np.uint8).tobytes()])
def test_what_is_no_sound_is_an_error_and_nothing_is_written(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioFileError, match="a.wav"):
        plot_file(tmp_path / "a.wav", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan]), RATE, subtype="FLOAT")
    with pytest.raises(AudioFileError, match="NaN"):
        plot_file(tmp_path / "a.wav", tmp_path / "a.png")
    soundfile.write(tmp_path / "b.wav", np.array([0.0, 3e38]), RATE, subtype="FLOAT")
    plot_file(tmp_path / "b.wav", tmp_path / "b.png")


def test_only_png_is_written(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(100), RATE)
    for name in ("a.jpg", "a", "a.wav"):
        with pytest.raises(AudioFileError, match="only .png files are written"):
            plot_file(tmp_path / "a.wav", tmp_path / name)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", sine(100), RATE)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    find = builtins.__import__

    def without(name, *arguments):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return find(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install '\.\[plot\]'"):
        plot_file(tmp_path / "a.wav", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
