"""Plain NumPy signal analysis of a clip: level, where it ends, tempo, pitch, key, and which instrument it is.

Nothing here knows what was asked for. The rules are calibrated on `golden.sounds` and stand a noise floor 20 dB below
the sound. Audio is float, (frames, channels) or (frames,), 44100 Hz; ValueError if it is empty or not finite.
"""

from __future__ import annotations

import numpy as np

SAMPLE_RATE = 44100
# wider than what is asked for, so that half and double are heard as such
TEMPO_RANGE = (25.0, 400.0)
PITCH_RANGE = (45.0, 1500.0)
SILENCE = "silence"
_HOP = 128
_LEVEL_HOP = 512


# --- level and end --------------------------------------------------------------------------------------------------


def mono(audio: np.ndarray) -> np.ndarray:
    """The mean of the channels, float64 (frames,)."""
    audio = np.asarray(audio, np.float64)
    if not audio.size or not np.isfinite(audio).all():
        raise ValueError("audio is empty or not finite")
    return audio if audio.ndim == 1 else audio.mean(axis=1)


def levels(audio: np.ndarray, size: int) -> np.ndarray:
    """Mean power over channels of consecutive stretches of `size` frames; what is left over at the end is dropped."""
    audio = np.asarray(audio, np.float64).reshape(len(audio), -1)
    if len(audio) < size:
        raise ValueError(f"{len(audio)} frames are too short to measure, {size} are needed")
    power = np.square(audio).mean(axis=1)
    return power[: len(power) // size * size].reshape(-1, size).mean(axis=1)


def _active(power: np.ndarray) -> float:
    """Mean power of what lies within 20 dB of the loudest: the level of the hits, not of the gaps between them."""
    return float(power[power >= power.max() / 100].mean())


def end_of_sound(audio: np.ndarray, below: float = 30.0) -> float:
    """Seconds at which the last 5 ms end that are within `below` dB of the clip's level; 0 for silence."""
    size = SAMPLE_RATE // 200
    power = levels(audio, size)
    loud = np.flatnonzero(power > _active(power) / 10 ** (below / 10))
    return float((loud[-1] + 1) * size / SAMPLE_RATE) if loud.size else 0.0


def silence_after(audio: np.ndarray, seconds: float, margin: float = 0.1) -> float:
    """Decibels of the loudest 10 ms from `seconds` + `margin` on, against the clip's level before `seconds`."""
    size = SAMPLE_RATE // 100
    before = _active(levels(audio[: round(seconds * SAMPLE_RATE)], size))
    after = levels(audio[round((seconds + margin) * SAMPLE_RATE) :], size).max()
    return float(10 * np.log10(max(after, 1e-20) / max(before, 1e-20)))


def _sounding(audio: np.ndarray) -> np.ndarray:
    """The mono signal up to the end of the sound, at least 93 ms."""
    signal = mono(audio)[: max(4096, round(end_of_sound(audio) * SAMPLE_RATE))]
    return np.pad(signal, (0, max(0, 4096 - len(signal))))


# --- tempo ----------------------------------------------------------------------------------------------------------


def _spectrogram(signal: np.ndarray, size: int, hop: int) -> tuple[np.ndarray, np.ndarray]:
    """Power (windows, bins) of Hann windows, the first wholly before the signal, and the bins' hertz."""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(signal, (size, 0)), size)[::hop]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)))
    return power, np.arange(power.shape[1]) * SAMPLE_RATE / size


def onset_strength(audio: np.ndarray, low_band: bool = False) -> np.ndarray:
    """How much louder the bands become, on a compressed scale, every 128 frames; `low_band`: only below 130 Hz."""
    power, hertz = _spectrogram(mono(audio), 2048, _HOP)
    if low_band:
        bands = power[:, hertz < 130].sum(axis=1, keepdims=True)
    else:
        bands = np.add.reduceat(power, np.searchsorted(hertz, [0, *np.geomspace(80, 14000, 29)]), axis=1)
    loudness = np.log1p(3 * np.sqrt(bands / max(bands.max(), 1e-20)))
    lag = 4  # a quarter of the window
    strength = np.maximum(loudness - np.pad(loudness, ((lag, 0), (0, 0)))[:-lag], 0).sum(axis=1)
    return np.maximum(strength - strength.max() / 4, 0)


def tempo(audio: np.ndarray, kind: str) -> float:
    """Beats a minute of a loop of `kind`, 0 where nothing repeats. Needs three onsets, which is about 2.5 s.

    The period is the shortest lag at which the onset strength's autocorrelation is nearly as high as anywhere; then,
    more finely, the one whose multiples hold most of the onset strength's spectrum. A drum loop has an onset a beat,
    an arpeggio two; of a house beat the low band is heard, which has the kick and not the hat between.
    """
    strength = onset_strength(audio, low_band=kind == "house")
    per_minute = 60 * SAMPLE_RATE / _HOP / (2 if kind == "arpeggio" else 1)
    shortest, longest = per_minute / TEMPO_RANGE[1], per_minute / TEMPO_RANGE[0]
    smooth = np.convolve(strength, np.hanning(15), "same")
    correlation = np.fft.irfft(np.abs(np.fft.rfft(smooth, 2 * len(smooth))) ** 2)[: int(longest) + 2]
    lags = _peaks(correlation)
    lags = lags[(lags >= shortest) & (correlation[lags] > 1e-6 * correlation[0])]
    if not lags.size:
        return 0.0
    lag = lags[correlation[lags] >= 0.6 * correlation[lags].max()][0]
    periods = lag * np.linspace(0.96, 1.04, 321)
    turn = np.exp(-2j * np.pi * np.arange(len(strength)) / periods[:, None])
    lines, power = np.zeros(len(periods)), np.ones_like(turn)
    for _ in range(8):
        power *= turn
        lines += np.abs(power @ strength)
    return float(per_minute / periods[np.argmax(lines)])


def _peaks(values: np.ndarray) -> np.ndarray:
    """Indices of the local maxima, ends excluded."""
    return 1 + np.flatnonzero((values[1:-1] >= values[:-2]) & (values[1:-1] > values[2:]))


# --- pitch and key --------------------------------------------------------------------------------------------------


def cents(hertz: float, note: float) -> float:
    """Distance in cents from `note`, a MIDI number (A4 = 69, 440 Hz), to `hertz`; far off for no pitch at all."""
    return float(100 * (12 * np.log2(max(hertz, 1.0) / 440) + 69 - note))


def pitch_track(signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hertz and clarity (0 to 1) of the windows of 93 ms, 23 ms apart, that are within 12 dB of the loudest.

    The first peak of McLeod's normalised square difference 2·Σx(i)·x(i+τ) / Σ(x(i)² + x(i+τ)²) that is nearly as high
    as its highest (McLeod and Wyvill, A Smarter Way to Find Pitch, 2005). Windows without a peak are left out.
    """
    size = 4096
    frames = np.lib.stride_tricks.sliding_window_view(signal, size)[::1024]
    power = np.square(frames).sum(axis=1)
    frames = frames[power > power.max() / 10**1.2]
    shortest, longest = (int(SAMPLE_RATE / hertz) + 2 for hertz in reversed(PITCH_RANGE))
    products = np.fft.irfft(np.abs(np.fft.rfft(frames, 2 * size, axis=1)) ** 2, axis=1)[:, :longest]
    squares = np.pad(np.cumsum(np.square(frames), axis=1), ((0, 0), (1, 0)))
    lags = np.arange(longest)
    similarity = 2 * products / (squares[:, size - lags] + squares[:, -1:] - squares[:, lags])
    hertz, clarity = [], []
    for row in similarity:
        peaks = _peaks(row)
        peaks = peaks[(peaks >= shortest) & (row[peaks] > 0)]
        if peaks.size:
            lag = peaks[row[peaks] >= 0.9 * row[peaks].max()][0]
            left, middle, right = row[lag - 1 : lag + 2]
            hertz.append(SAMPLE_RATE / (lag + 0.5 * (left - right) / (left - 2 * middle + right)))
            clarity.append(middle)
    return np.array(hertz), np.array(clarity)


def pitch(audio: np.ndarray) -> float:
    """Hertz of a steady or decaying tone, the median over time; 0 where there is none."""
    hertz, _ = pitch_track(_sounding(audio))
    return float(np.median(hertz)) if hertz.size else 0.0


def key(audio: np.ndarray) -> tuple[int, str]:
    """Root pitch class (C = 0) and `minor` or `major` of an arpeggio; (-1, "") where nothing is pitched.

    The triad on whose notes most of the time is spent; the root, which is played as root and octave, counts twice.
    """
    hertz, clarity = pitch_track(_sounding(audio))
    hertz = hertz[clarity > 0.8]
    if not hertz.size:
        return -1, ""
    spent = np.bincount(np.round(12 * np.log2(hertz / 440) + 69).astype(int) % 12, minlength=12)
    scores = {
        (root, scale): 2 * spent[root] + spent[(root + third) % 12] + spent[(root + 7) % 12]
        for root in range(12)
        for scale, third in (("minor", 3), ("major", 4))
    }
    return max(scores, key=scores.__getitem__)


# --- instrument -----------------------------------------------------------------------------------------------------


def instrument(audio: np.ndarray) -> str:
    """Which of the demo model's ten sounds this is, or `silence`. A tree of five rules:

    1. A level that falls by more than 35 dB a second (drums 70 and up, strings up to 18, the others 0) is a drum's.
       With half its energy below 160 Hz (kicks and house beats 80 % and up, snares up to 10 %) it is a house beat if
       its loudest moment above 4 kHz comes within 22 dB of the loudest of all (house beats 13, kicks 56), else a kick.
       With half its energy above 4 kHz it is a hat (all of it, snares up to 33 %), else a snare.
    2. A signal that is not periodic (clarity below 0.6; the sweeps have 0.2, pitched sounds 0.95) is a noise sweep.
    3. One whose pitch is more than 80 cents off its median for a fifth of the time is an arpeggio.
    4. One whose level falls by more than 6 dB a second is a plucked string.
    5. Without harmonics (second and third 24 dB below the first) it is a sine; with a second harmonic above the third
       a saw, below it a square wave.
    """
    signal = _sounding(audio)
    if not signal.any():
        return SILENCE
    if _fall_of_hits(signal) > 35:
        return _drum(signal)
    hertz, clarity = pitch_track(signal)
    if not hertz.size or np.median(clarity) < 0.6:
        return "sweep"
    hertz = hertz[clarity > 0.6]
    median = float(np.median(hertz))
    if np.mean(np.abs(np.log2(hertz / median)) > 80 / 1200) > 0.2:
        return "arpeggio"
    if _fall_of_clip(signal) > 6:
        return "pluck"
    first, second, third = (_line(signal, k * median) for k in (1, 2, 3))
    if max(second, third) < first - 24:
        return "sine"
    return "saw" if second > third else "square"


def _level(signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decibels of Hann windows of 46 ms, 12 ms apart, and which are within 20 dB of the loudest."""
    frames = np.lib.stride_tricks.sliding_window_view(signal, 2048)[::_LEVEL_HOP]
    level = 10 * np.log10(np.square(frames) @ np.hanning(2048) + 1e-12)
    return level, level > level.max() - 20


def _fall_of_hits(signal: np.ndarray) -> float:
    """Decibels a second by which the level falls over 35 ms, the median: a loop of hits falls most of the time."""
    lag = 3
    level, loud = _level(signal)
    fall = (level[:-lag] - level[lag:])[loud[:-lag]]
    return float(np.median(fall)) * SAMPLE_RATE / (lag * _LEVEL_HOP) if fall.size else 0.0


def _fall_of_clip(signal: np.ndarray) -> float:
    """Decibels a second by which the level falls over the whole clip: a line fitted to its loud part."""
    level, loud = _level(signal)
    times = np.flatnonzero(loud) * _LEVEL_HOP / SAMPLE_RATE
    return float(-np.polyfit(times, level[loud], 1)[0]) if len(times) > 1 else 0.0


def _drum(signal: np.ndarray) -> str:
    power, hertz = _spectrogram(signal, 1024, 256)
    high, total = power[:, hertz > 4000].sum(axis=1), power.sum(axis=1)
    if power[:, hertz < 160].sum() > 0.5 * total.sum():
        return "house" if high.max() > total.max() / 10**2.2 else "kick"
    return "hat" if high.sum() > 0.5 * total.sum() else "snare"


def _line(signal: np.ndarray, hertz: float) -> float:
    """Decibels of the strongest spectral line within 2 % of `hertz`."""
    size = 1 << (len(signal) - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(signal * np.hanning(len(signal)), size))
    low, high = (int(hertz * edge * size / SAMPLE_RATE) for edge in (0.98, 1.02))
    return float(20 * np.log10(spectrum[low : high + 2].max() + 1e-12))


def sweep_direction(audio: np.ndarray) -> str:
    """`rising` or `falling`: the mean log frequency of the last third against the first third's."""
    power, hertz = _spectrogram(_sounding(audio), 2048, 1024)
    power, octaves = power[:, 1:], np.log2(hertz[1:])
    third = len(power) // 3
    first, last = (part.sum(axis=0) @ octaves / max(part.sum(), 1e-20) for part in (power[:third], power[-third:]))
    return "rising" if last > first else "falling"
