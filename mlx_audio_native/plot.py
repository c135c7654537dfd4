"""Pictures of sound: waveform and spectrogram."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from .audio import check_output, new_file
from .errors import AudioFileError, InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_SAMPLES = 2**27  # of all channels: more than ten minutes at 96 kHz in stereo
_COLUMNS = 1600
_WINDOW = 2048
_FLOOR_DB = -90.0


def plot_file(path: Path, output: Path, overwrite: bool = False) -> None:
    """Draw a sound file as a PNG, whole or not at all. Raises InputError without matplotlib, or AudioFileError."""
    check_output(output, overwrite, ".png")
    try:
        with soundfile.SoundFile(path) as file:
            if not 0 < file.frames * file.channels <= _MAX_SAMPLES:
                raise AudioFileError(f"cannot draw {path}: it holds nothing, or more than a picture can show")
            samples, rate = file.read(dtype="float64", always_2d=True), file.samplerate
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: .raw, which has no header
        raise AudioFileError(f"cannot read {path}: {error}") from None
    if not np.isfinite(samples).all():
        raise AudioFileError(f"cannot draw {path}: its samples hold NaN or infinity")
    picture = figure(samples, rate)
    with new_file(output) as part:
        picture.savefig(part, format="png")


def figure(samples: np.ndarray, sample_rate: int) -> Figure:
    """Waveform of each channel and spectrogram of their mean, of samples (frames, channels); rate in Hz."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("drawing takes an extra: pip install '.[plot]' in the clone") from error
    seconds = len(samples) / sample_rate
    picture = Figure(figsize=(10, 6), layout="constrained")
    wave, spectrum = picture.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    low, high = envelope(samples)
    times = (np.arange(len(low)) + 0.5) * seconds / len(low)
    for channel in range(samples.shape[1]):
        wave.fill_between(times, low[:, channel], high[:, channel], alpha=0.6, linewidth=0.5)
    limit = max(1.0, float(np.abs(samples).max()))
    wave.set(ylim=(-limit, limit), ylabel="amplitude")
    image = spectrum.imshow(
        spectrogram(samples.mean(axis=1)),
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=_FLOOR_DB,
        vmax=0,
        extent=(0, seconds, 0, sample_rate / 2000),
    )
    spectrum.set(xlim=(0, seconds), xlabel="seconds", ylabel="kHz")
    picture.colorbar(image, ax=spectrum, label="dB below the loudest")
    return picture


def envelope(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest sample of each of at most 1600 stretches, (stretches, channels)."""
    starts = np.linspace(0, len(samples), min(_COLUMNS, len(samples)), endpoint=False).astype(int)
    return np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """dB below the loudest, (frequencies, at most 1600 columns), each of a Hann window centred on its column."""
    window = min(_WINDOW, len(samples))
    columns = min(_COLUMNS, -(-len(samples) // (window // 4 or 1)))
    centres = ((np.arange(columns) + 0.5) * len(samples) / columns).astype(int)
    padded = np.pad(samples, (window // 2, window - window // 2))
    frames = padded[centres[:, None] + np.arange(window)]
    magnitude = np.abs(np.fft.rfft(frames * np.hanning(window + 2)[1:-1], axis=1)).T
    loudest = magnitude.max() or 1.0
    return 20 * np.log10(np.maximum(magnitude / loudest, 10 ** (_FLOOR_DB / 20)))
