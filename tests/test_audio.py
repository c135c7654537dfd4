"""WAV files and the recipes inside."""

import json
import resource
import struct
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_audio_native.audio import Audio, Recipe, read_recipe
from mlx_audio_native.errors import AudioFileError, ConfigError

RECIPE = Recipe(
    prompt="kick drum loop, 120 BPM",
    negative_prompt=None,
    seconds=4.0,
    seed=7,
    steps=8,
    sampler="pingpong",
    cfg_scale=1.0,
    model="demo",
    model_sha256="0" * 64,
    version="0.1.0",
)


def audio(peak: float = 0.5, frames: int = 441, channels: int = 2, recipe: Recipe = RECIPE) -> Audio:
    samples = np.random.default_rng(0).uniform(-1, 1, (frames, channels)).astype(np.float32)
    return Audio(samples / np.abs(samples).max() * np.float32(peak), 44100, recipe)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("frames", [1, 440, 441])
def test_saves_24_bits_as_they_are(tmp_path, frames, channels):
    clip = audio(1.0, frames, channels)
    clip.save(tmp_path / "a.wav")
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_24"
    samples, rate = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)
    assert samples.shape == (frames, channels) and rate == 44100
    np.testing.assert_allclose(samples, clip.samples, atol=2**-23)
    assert read_recipe(tmp_path / "a.wav") == RECIPE
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize("peak", [1.001, 2.5])
def test_scales_a_peak_above_one_and_says_so(tmp_path, peak):
    clip = audio(peak)
    clip.save(tmp_path / "a.wav")
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_allclose(samples, clip.samples / peak, atol=2**-22)
    assert read_recipe(tmp_path / "a.wav").peak_scale == pytest.approx(1 / peak)
    assert np.abs(clip.samples).max() == pytest.approx(peak)


def test_silence_is_saved_unscaled(tmp_path):
    Audio(np.zeros((10, 2), np.float32), 44100, RECIPE).save(tmp_path / "a.wav")
    assert read_recipe(tmp_path / "a.wav").peak_scale == 1


@given(
    st.builds(
        Recipe,
        prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=3000),
        negative_prompt=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
        seconds=st.floats(0, 1e6),
        seed=st.integers(0, 2**64 - 1),
        steps=st.integers(1, 10_000),
        sampler=st.sampled_from(["pingpong", "euler"]),
        cfg_scale=st.floats(-100, 100),
        model=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        model_sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
        version=st.just("0.1.0"),
    )
)
@example(replace(RECIPE, prompt="x" * 100_000))
@example(replace(RECIPE, prompt='NUL \0, bell \a, quote ", é, 太鼓 🥁'))
def test_any_recipe_survives(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "a.wav"
    audio(recipe=recipe, frames=3).save(path)
    assert read_recipe(path) == recipe
    assert soundfile.info(path).frames == 3


def test_other_programs_read_the_comment(tmp_path):
    audio().save(tmp_path / "a.wav")
    with soundfile.SoundFile(tmp_path / "a.wav") as file:
        assert json.loads(file.comment)["prompt"] == RECIPE.prompt


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path):
    path = tmp_path / "a.wav"
    audio().save(path)
    before = path.read_bytes()
    with pytest.raises(AudioFileError, match="it exists, and is kept"):
        audio(recipe=replace(RECIPE, seed=8)).save(path)
    assert path.read_bytes() == before
    audio(recipe=replace(RECIPE, seed=8)).save(path, overwrite=True)
    assert read_recipe(path).seed == 8


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a.mp3", "only .wav"),
        ("missing/a.wav", "no folder"),
        ("folder.wav", "is a folder"),
        ("n" * 300 + ".wav", "cannot"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, name, problem):
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(AudioFileError, match=problem):
        audio().save(tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.wav"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.wav"
    audio(frames=3).save(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(AudioFileError, match=r"^cannot write .*/a\.wav: File too large$"):
            audio(frames=1000).save(path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_nan_is_not_written(tmp_path):
    clip = audio()
    clip.samples[3, 1] = np.nan
    with pytest.raises(AudioFileError, match="NaN"):
        clip.save(tmp_path / "a.wav")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": 3}, "the recipe.prompt must be a string"),
        ({"seconds": float("nan")}, "the recipe.seconds must be a finite number"),
        ({"seed": True}, "the recipe.seed must be a whole number"),
        ({"tempo": 120}, "unknown key 'tempo'"),
    ],
)
def test_a_recipe_with_a_wrong_field_is_refused(change, problem):
    values = json.loads(RECIPE.to_json())
    with pytest.raises(ConfigError, match=problem):
        Recipe.from_json(json.dumps(values | change))


@pytest.mark.parametrize("text", ["", "made with love", "[]", "[" * 100_000, '{"prompt": "kick"}'])
def test_a_comment_that_is_no_recipe_is_refused(text):
    with pytest.raises(ConfigError):
        Recipe.from_json(text)


def chunk(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(body) if size is None else size) + body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0" * 1_000_000,
        chunk(b"data", b"", 2**32 - 1),
        chunk(b"LIST", b"INFO" + chunk(b"ICMT", b"{}", 2**32 - 1)),
        chunk(b"LIST", b"IN", 2),
        chunk(b"LIST", b"INFO", 2**32 - 1),
        chunk(b"LIST", b"INFO" + chunk(b"ICMT", b"\xff\xfe")),
    ],
    ids=[
        "nothing",
        "empty chunks",
        "data past the end",
        "comment past the end",
        "short",
        "list past the end",
        "not utf-8",
    ],
)
def test_a_hostile_wav_ends_in_an_error(tmp_path, body):
    (tmp_path / "a.wav").write_bytes(b"RIFF\0\0\0\0WAVE" + body)
    with pytest.raises(AudioFileError, match=r"a\.wav"):
        read_recipe(tmp_path / "a.wav")


@given(st.data())
def test_a_damaged_wav_gives_a_recipe_or_an_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.wav"
    audio(frames=3).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert isinstance(read_recipe(path), Recipe)
    except AudioFileError as error:
        assert "\n" not in str(error)


def test_no_file_and_no_wav_are_said(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for path in (tmp_path / "missing.wav", tmp_path, tmp_path / "a.txt"):
        with pytest.raises(AudioFileError):
            read_recipe(path)
