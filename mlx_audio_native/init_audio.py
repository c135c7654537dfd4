"""Audio to start from: any file that libsndfile reads, as samples that a model's autoencoder takes."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from .audio import Audio
from .errors import AudioFileError, InputError
from .tensorfile import sha256

# where none is asked for: much follows the prompt, and the source can still be heard
NOISE_LEVEL = 0.7


@dataclass(frozen=True, eq=False)
class Source:
    """float32 samples (frames, channels) at a model's rate, at most its window, and where they come from."""

    samples: np.ndarray
    name: str = ""
    sha256: str = ""


def read_source(
    audio: str | os.PathLike[str] | Audio, sample_rate: int, channels: int, window: int, trim: bool = False
) -> Source:
    """Audio from a file or from memory, resampled by soxr, which is an extra; with `trim` its first `window` frames.

    Mono serves every channel, of too many the first are taken. A peak above 1 is scaled down to 1, with a warning.
    Raises AudioFileError for what cannot be read or, without `trim`, is longer than `window`; InputError without soxr.
    """
    if isinstance(audio, Audio):
        samples, rate, name = audio.samples, audio.sample_rate, "the init audio"
        samples = samples[: _limit(len(samples), rate, sample_rate, window, trim, name)]
        digest = hashlib.sha256(np.ascontiguousarray(audio.samples)).hexdigest()
    else:
        path, name = Path(audio), str(audio)
        try:
            path.open("rb").close()  # libsndfile calls whatever is wrong a system error
            with soundfile.SoundFile(path) as file:
                rate = file.samplerate
                limit = _limit(file.frames, rate, sample_rate, window, trim, name)
                samples = file.read(limit, dtype="float32", always_2d=True)
            digest = sha256(path)
        except OSError as error:
            raise AudioFileError(f"cannot read {name}: {error.strerror}") from None
        except (soundfile.SoundFileError, TypeError) as error:  # TypeError: .raw, which has no header to tell the rate
            raise AudioFileError(f"cannot read {name}: {' '.join(str(error).split())}") from None
        name = path.name
    return Source(_fit(samples, rate, sample_rate, channels, name)[:window], name, digest)


def _limit(frames: int, rate: int, sample_rate: int, window: int, trim: bool, name: str) -> int:
    """How many frames to read."""
    limit = math.ceil(window * rate / sample_rate)
    if frames > limit and not trim:
        raise AudioFileError(
            f"{name} has {frames / rate:.3f} s, and the window of this model {window / sample_rate:.3f} s "
            "(--trim, or trim=True in Python, takes the start)"
        )
    return limit


def _fit(samples: np.ndarray, rate: int, sample_rate: int, channels: int, name: str) -> np.ndarray:
    """Samples (frames, any channels) as a model takes them."""
    if not len(samples) or not np.isfinite(samples).all():
        raise AudioFileError(f"{name} holds {'NaN or infinity' if len(samples) else 'no samples'}")
    if channels == 1:
        samples = samples.mean(axis=1, keepdims=True)
    elif samples.shape[1] < channels:
        samples = samples[:, np.arange(channels) % samples.shape[1]]
    samples = samples[:, :channels]  # of more than two channels the first, as the reference does
    if (peak := np.abs(samples).max()) > 1:
        warnings.warn(f"{name} peaks at {peak:.3g} and is scaled down to 1", stacklevel=2)
        samples = samples / peak
    return samples if rate == sample_rate else _resample(samples, rate, sample_rate, name)


def _resample(samples: np.ndarray, rate: int, sample_rate: int, name: str) -> np.ndarray:
    try:
        import soxr
    except ImportError:
        problem = f"{name} has {rate} Hz and the model {sample_rate}"
        raise InputError(f"{problem}: resampling takes an extra: pip install '.[audio]' in the clone") from None
    try:
        resampled = soxr.resample(samples, rate, sample_rate)
    except (RuntimeError, ValueError) as error:
        raise AudioFileError(f"cannot resample {name} from {rate} Hz: {error}") from None
    if not len(resampled):
        raise AudioFileError(f"{name} is too short to be resampled from {rate} Hz")
    return resampled
