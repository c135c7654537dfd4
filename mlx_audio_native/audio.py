"""Audio with the recipe that made it, and WAV files that carry both."""

from __future__ import annotations

import io
import json
import math
import os
import re
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from .errors import AudioFileError, ConfigError
from .schema import Section, check

# How much of a WAV that anybody may have made is looked at.
_MAX_CHUNKS, _MAX_INFO_BYTES = 1000, 1 << 20


@dataclass(frozen=True)
class Recipe:
    """What makes a clip again: the request, the model by name and sha256 of its weights file, the package version.

    What a request did without is None; init audio stands by its file's name and sha256. `peak_scale` is the factor a
    file's samples were multiplied with to keep them within ±1; 1.0 left them alone.
    """

    prompt: str
    negative_prompt: str | None
    seconds: float
    seed: int
    steps: int
    sampler: str
    cfg_scale: float
    model: str
    model_sha256: str
    version: str
    peak_scale: float = 1.0
    init_audio: str | None = None
    init_audio_sha256: str | None = None
    noise_level: float | None = None
    inpaint: tuple[float, float] | None = None
    bars: int | None = None
    bpm: float | None = None

    def options(self) -> dict[str, Any]:
        """What `Model.generate` takes to make the clip again, but for init audio, of which the recipe holds no copy."""
        how_made = ("model", "model_sha256", "version", "peak_scale", "init_audio", "init_audio_sha256")
        length = ("bars", "bpm") if self.bars is None else ("seconds",)
        return {name: value for name, value in asdict(self).items() if name not in how_made + length}

    def to_json(self) -> str:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises ConfigError for anything but a whole recipe, each field of its type, and nothing more."""
        try:
            section = Section(json.loads(text), "the recipe")
        except (ValueError, RecursionError):
            raise ConfigError("its comment is not a recipe") from None
        recipe = cls(
            prompt=section.take("prompt", str),
            negative_prompt=section.take("negative_prompt", str, None),
            seconds=section.take("seconds", float),
            seed=section.take("seed", int),
            steps=section.take("steps", int),
            sampler=section.take("sampler", str),
            cfg_scale=section.take("cfg_scale", float),
            model=section.take("model", str),
            model_sha256=section.take("model_sha256", str),
            version=section.take("version", str),
            peak_scale=section.take("peak_scale", float),
            init_audio=section.take("init_audio", str, None),
            init_audio_sha256=section.take("init_audio_sha256", str, None),
            noise_level=section.take("noise_level", float, None),
            inpaint=section.many("inpaint", float, ()) or None,
            bars=section.take("bars", int, None),
            bpm=section.take("bpm", float, None),
        )
        check(recipe.inpaint is None or len(recipe.inpaint) == 2, "the recipe.inpaint must be a start and an end")
        section.done()
        return recipe


@dataclass(frozen=True, eq=False)
class Audio:
    """float32 samples (frames, channels), as the decoder gave them, their rate in Hz, and how they were made."""

    samples: np.ndarray
    sample_rate: int
    recipe: Recipe

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a 24-bit PCM WAV with the recipe inside, whole or not at all.

        Samples are scaled down only if their peak exceeds 1, and the file's recipe says so. Raises AudioFileError if
        the file exists (unless `overwrite`) or cannot be written, or if the recipe does not read back.
        """
        path = Path(path)
        check_output(path, overwrite)
        peak = float(np.abs(self.samples).max(initial=0.0))
        if not math.isfinite(peak):
            raise AudioFileError(f"{path} was not written: the samples hold NaN or infinity")
        scale = 1 / peak if peak > 1 else 1.0
        recipe = replace(self.recipe, peak_scale=scale)
        wav = io.BytesIO()
        soundfile.write(wav, self.samples * np.float32(scale), self.sample_rate, subtype="PCM_24", format="WAV")
        with new_file(path) as part:
            part.write_bytes(_with_comment(wav.getvalue(), recipe.to_json()))
            if read_recipe(part) != recipe:
                raise AudioFileError(f"{path} was not written: its recipe does not read back")


def file_stem(prompt: str) -> str:
    """A prompt as the name of a file, without suffix."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:50] or "clip"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A hidden `.part` file to write to, which becomes `path` if all goes well, and goes if not.

    Raises AudioFileError where the folder does not allow that.
    """
    part = path.with_name(f".{secrets.token_hex(4)}.part")  # in the same folder, so that renaming is atomic
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise AudioFileError(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def check_output(path: Path, overwrite: bool, suffix: str = ".wav") -> None:
    """Raises AudioFileError if such a file should not or cannot go there, as far as can be told before writing."""
    folder = path.parent
    if path.suffix.lower() != suffix:
        problem = f"only {suffix} files are written"
    elif not os.path.isdir(folder):
        problem = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK):
        problem = f"the folder {folder} is not writable"
    elif os.path.isdir(path):
        problem = "it is a folder"
    elif os.path.exists(path) and not overwrite:
        problem = "it exists, and is kept (--overwrite, or overwrite=True in Python, replaces it)"
    else:
        return
    raise AudioFileError(f"cannot write {path}: {problem}")


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe inside a WAV that `Audio.save` wrote; AudioFileError if the file is no such WAV."""
    try:
        return Recipe.from_json(_read_comment(Path(path)))
    except OSError as error:
        raise AudioFileError(f"cannot read {path}: {error.strerror}") from None
    except ConfigError as error:
        raise AudioFileError(f"cannot use {path}: {error}") from None


def _with_comment(wav: bytes, text: str) -> bytes:
    """A WAV with the standard LIST/INFO/ICMT chunk; from 2046 bytes on, libsndfile neither writes nor reads it."""
    comment = _chunk(b"ICMT", text.encode() + b"\0")
    return _chunk(b"RIFF", wav[8:] + _chunk(b"LIST", b"INFO" + comment))


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack("<4sI", name, len(body)) + body + b"\0" * (len(body) % 2)


def _read_comment(path: Path) -> str:
    """The text of the first ICMT chunk, however long."""
    with open(path, "rb") as file:
        riff = file.read(12)
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            raise ConfigError("it is not a WAV file")
        for name, size in _chunks(file):
            if name == b"LIST" and 4 <= size <= _MAX_INFO_BYTES and file.read(4) == b"INFO":
                info = io.BytesIO(file.read(size - 4))
                for key, length in _chunks(info):
                    if key == b"ICMT":
                        return info.read(length).rstrip(b"\0").decode(errors="replace")
    raise ConfigError("it carries no recipe")


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Names and sizes of the RIFF chunks that follow; at each, the file stands at the chunk's body."""
    for _ in range(_MAX_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            return
        name, size = struct.unpack("<4sI", header)
        body = file.tell()
        yield name, size
        file.seek(body + size + size % 2)
