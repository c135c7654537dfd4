"""What a rendered clip sounds like, heard with NumPy alone: tempo, pitch, instrument, key, where it ends.

Nothing here sees a prompt. The rules are simple and hold for the sounds of `golden.sounds`; they are calibrated to
stand a noise floor 30 dB below the sound. Audio is float, (frames, channels) or (frames,), 44100 Hz.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLE_RATE = 44100
PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
SUSTAINED = ("sine", "square", "saw", "sweep")
TEMPO_KINDS = ("kick", "snare", "hat", "house", "arpeggio")
PITCH_KINDS = ("sine", "square", "saw", "pluck")
TEMPO_RANGE = (25.0, 400.0)  # wider than what is asked for, so that half and double are heard as such
PITCH_RANGE = (45.0, 1500.0)
SILENCE = "silence"  # what `instrument` calls a clip without sound
_HOP = 128


# --- levels and ends ------------------------------------------------------------------------------------------------


def mono(audio: np.ndarray) -> np.ndarray:
    """The mean of the channels, float64 (frames,). Raises ValueError for empty or non-finite audio."""
    audio = np.asarray(audio, np.float64)
    signal = audio if audio.ndim == 1 else audio.mean(axis=1)
    if not signal.size or not np.isfinite(signal).all():
        raise ValueError("audio is empty or not finite")
    return signal


def levels(audio: np.ndarray, window: float) -> np.ndarray:
    """Power of consecutive stretches of `window` seconds, over all channels (windows,)."""
    audio = np.asarray(audio, np.float64)
    power = np.square(audio if audio.ndim == 1 else np.sqrt(np.square(audio).mean(axis=1)))
    size = round(window * SAMPLE_RATE)
    count = max(1, len(power) // size)
    return np.array([stretch.mean() for stretch in np.array_split(power[: count * size], count)])


def _active_power(power: np.ndarray) -> float:
    """Mean power of the windows within 20 dB of the loudest: the level of the hits, not of the gaps between them."""
    return float(power[power >= power.max() / 100].mean())


def end_of_sound(audio: np.ndarray, below: float = 30.0) -> float:
    """Seconds at which the sound ends: the end of the last 5 ms that is within `below` dB of the clip's level (0 for silence)."""
    power = levels(audio, 0.005)
    if power.max() == 0:
        return 0.0
    loud = np.flatnonzero(power > _active_power(power) / 10 ** (below / 10))
    return float(loud[-1] + 1) * 0.005


def silence_after(audio: np.ndarray, seconds: float, margin: float = 0.1) -> float:
    """Decibels of the loudest 10 ms from `seconds` + `margin` on, relative to the clip's level before `seconds`."""
    before = levels(audio[: max(1, round(seconds * SAMPLE_RATE))], 0.01)
    rest = audio[round((seconds + margin) * SAMPLE_RATE) :]
    if not len(rest):
        raise ValueError(f"the clip ends before {seconds + margin:.2f} s")
    after = levels(rest, 0.01).max()
    if before.max() == 0:
        return np.inf
    return float(10 * np.log10(max(after / _active_power(before), 1e-20)))


# --- tempo ----------------------------------------------------------------------------------------------------------


def _spectrogram(signal: np.ndarray, size: int, hop: int) -> np.ndarray:
    """Magnitudes (windows, bins) of Hann windows; the first lies wholly before the signal, the last ends with it."""
    padded = np.pad(signal, (size, 0))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    return np.abs(np.fft.rfft(frames * np.hanning(size), axis=1))


def onset_strength(audio: np.ndarray, below: float = np.inf) -> np.ndarray:
    """Spectral flux every 128 frames: how much louder, on a compressed scale, the bins under `below` hertz become."""
    size, lag = 2048, 4
    spectrum = _spectrogram(mono(audio), size, _HOP)
    spectrum = spectrum[:, np.arange(spectrum.shape[1]) * SAMPLE_RATE / size < below]
    compressed = np.log1p(30 * spectrum / max(spectrum.max(), 1e-12))
    before = np.pad(compressed, ((lag, 0), (0, 0)))[:-lag]
    return np.maximum(compressed - before, 0).sum(axis=1)


def tempo(audio: np.ndarray, kind: str) -> float:
    """Beats a minute; 0 where nothing repeats. Needs three onsets, so about 2.5 s.

    The period is the shortest lag at which the onset strength's autocorrelation has a high peak, made precise as the
    one whose multiples hold most of the onset strength's spectrum. A drum loop has an onset a beat and an arpeggio
    two; in a house beat the low band, which the hat does not reach, has the beat.
    """
    strength = onset_strength(audio, 130.0 if kind == "house" else np.inf)
    strength = np.maximum(strength - 0.1 * strength.max(), 0)
    per_beat = 2 if kind == "arpeggio" else 1
    rate = SAMPLE_RATE / _HOP
    shortest, longest = (60 * rate / per_beat / bpm for bpm in reversed(TEMPO_RANGE))
    smooth = np.convolve(strength, np.hanning(15), "same")
    size = 2 * len(smooth)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(smooth, size)) ** 2)[: int(longest) + 2]
    lags = np.arange(1, len(correlation) - 1)
    peak = (correlation[1:-1] >= correlation[:-2]) & (correlation[1:-1] > correlation[2:]) & (lags >= shortest)
    lags = lags[peak]
    if not lags.size:
        return 0.0
    lag = lags[correlation[lags] >= 0.6 * correlation[lags].max()][0]
    # a period's spectrum stands at its multiples; n onsets tell 1/n of a period apart, so ±4 % holds no second peak
    periods = lag * np.linspace(0.96, 1.04, 321)
    multiples = np.arange(1, 9)[:, None] / periods
    score = sum(np.abs(np.exp(-2j * np.pi * np.outer(m, np.arange(len(strength)))) @ strength) for m in multiples)
    return float(60 * rate / per_beat / periods[np.argmax(score)])


# --- pitch ----------------------------------------------------------------------------------------------------------


def cents(hertz: float, note: float) -> float:
    """Distance in cents from `note` (a MIDI number, A4 = 69) to `hertz`."""
    return float(100 * (12 * np.log2(max(hertz, 1e-6) / 440) + 69 - note))


def pitch_track(audio: np.ndarray, size: int = 4096, hop: int = 1024) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hertz, clarity (0..1) and power of windows of 93 ms, every 23 ms.

    McLeod's normalised square difference: 2·Σx(i)x(i+τ) / Σ(x(i)² + x(i+τ)²), its first peak that is nearly as high as
    the highest (McLeod and Wyvill, "A smarter way to find pitch", 2005).
    """
    signal = mono(audio)
    signal = np.pad(signal, (0, max(0, size - len(signal))))
    frames = np.lib.stride_tricks.sliding_window_view(signal, size)[::hop]
    frames = frames - frames.mean(axis=1, keepdims=True)
    longest = int(SAMPLE_RATE / PITCH_RANGE[0]) + 2
    shortest = int(SAMPLE_RATE / PITCH_RANGE[1])
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2 * size, axis=1)) ** 2, axis=1)[:, :longest]
    square = np.pad(np.cumsum(np.square(frames), axis=1), ((0, 0), (1, 0)))
    lags = np.arange(longest)
    energy = square[:, size - lags] + square[:, -1:] - square[:, lags]
    difference = 2 * correlation / np.maximum(energy, 1e-12)
    hertz, clarity = np.zeros(len(frames)), np.zeros(len(frames))
    for i, row in enumerate(difference):
        peaks = 1 + np.flatnonzero((row[1:-1] >= row[:-2]) & (row[1:-1] > row[2:]))
        peaks = peaks[(peaks >= shortest) & (row[peaks] > 0)]
        if peaks.size:
            lag = peaks[row[peaks] >= 0.9 * row[peaks].max()][0]
            left, middle, right = row[lag - 1 : lag + 2]
            offset = 0.5 * (left - right) / (left - 2 * middle + right)
            hertz[i], clarity[i] = SAMPLE_RATE / (lag + offset), middle
    return hertz, clarity, square[:, -1] / size


def pitch(audio: np.ndarray) -> float:
    """Hertz of a steady or decaying tone, 0 where there is none: the median over the louder windows."""
    hertz, _, power = pitch_track(audio)
    heard = (power > power.max() / 100) & (hertz > 0)
    return float(np.median(hertz[heard])) if heard.any() else 0.0


# --- instrument and key ---------------------------------------------------------------------------------------------


def instrument(audio: np.ndarray) -> str:
    """Which of the demo model's sounds this is, or `silence`, by a tree of five rules. Thresholds lie midway in decibels.

    1. The level falls by more than 40 dB a second, in the median (drums 72 and up, strings up to 18, others 0): a drum.
       Energy below 160 Hz (kick 90 %, snare 10 %, hat none) makes it a kick, or a house beat where the loudest moment
       above 5 kHz is within 22 dB of the loudest of all (house 13, kick 59); above 5 kHz a hat (99 %, snare 32 %).
    2. Windows of 93 ms are not periodic (clarity .17; of pitched sounds .95): a noise sweep.
    3. The pitch is off its median for more than a fifth of the time: an arpeggio.
    4. The level falls by more than 6 dB a second: a plucked string.
    5. Second and third harmonic against the first: none within 24 dB a sine, the second louder a saw, else a square.
    """
    end = end_of_sound(audio)
    if end == 0:
        return SILENCE
    signal = mono(audio)[: max(4096, round(end * SAMPLE_RATE))]
    decay = decay_rate(signal)
    if decay > 40:
        return _drum(signal)
    hertz, clarity, power = pitch_track(signal)
    heard = power > power.max() / 100
    if np.median(clarity[heard]) < 0.6:
        return "sweep"
    heard &= hertz > 0
    median = np.median(hertz[heard])
    if np.mean(np.abs(np.log2(hertz[heard] / median)) > 1 / 15) > 0.2:
        return "arpeggio"
    if decay > 6:
        return "pluck"
    first, second, third = harmonics(signal, float(median), 3)
    if max(second, third) < first - 24:
        return "sine"
    return "saw" if second > third else "square"


def decay_rate(audio: np.ndarray) -> float:
    """Decibels a second by which the level falls: the median over the windows within 20 dB of the loudest."""
    hop, lag = 512, 3
    frames = np.lib.stride_tricks.sliding_window_view(mono(audio), 2048)[::hop]
    level = 10 * np.log10(np.square(frames) @ np.hanning(2048) + 1e-12)
    fall = (level[:-lag] - level[lag:]) * SAMPLE_RATE / (lag * hop)
    return float(np.median(fall[level[:-lag] > level.max() - 20]))


def _drum(signal: np.ndarray) -> str:
    size = 1024
    power = _spectrogram(signal, size, 256) ** 2
    hertz = np.arange(power.shape[1]) * SAMPLE_RATE / size
    high, total = power[:, hertz > 5000].sum(axis=1), power.sum(axis=1)
    if power[:, hertz < 160].sum() > 0.5 * total.sum():
        return "house" if high.max() > total.max() * 10**-2.2 else "kick"
    return "hat" if high.sum() > 0.65 * total.sum() else "snare"


def harmonics(signal: np.ndarray, hertz: float, count: int) -> list[float]:
    """Decibels of the strongest line within 2 % of each of the first harmonics of `hertz`."""
    size = 1 << (len(signal) - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(signal * np.hanning(len(signal)), size))
    lines = []
    for k in range(1, count + 1):
        low, high = (int(k * hertz * edge * size / SAMPLE_RATE) for edge in (0.98, 1.02))
        lines.append(float(20 * np.log10(spectrum[low : high + 2].max(initial=0) + 1e-12)))
    return lines


def key(audio: np.ndarray) -> tuple[int, str]:
    """Root pitch class (C = 0) and `minor` or `major` of an arpeggio of root, third, fifth and octave; (-1, "") where nothing is pitched.

    The triad on which most of the time is spent, the root, which is played twice, counting twice.
    """
    hertz, clarity, power = pitch_track(audio)
    heard = (power > power.max() / 100) & (clarity > 0.8) & (hertz > 0)
    if not heard.any():
        return -1, ""
    classes = np.round(12 * np.log2(hertz[heard] / 440) + 69).astype(int) % 12
    spent = np.bincount(classes, minlength=12)
    scores = {
        (root, scale): 2 * spent[root] + spent[(root + third) % 12] + spent[(root + 7) % 12]
        for root in range(12)
        for scale, third in (("minor", 3), ("major", 4))
    }
    return max(scores, key=scores.__getitem__)


def sweep_direction(audio: np.ndarray) -> str:
    """`rising` or `falling`: where the mean log frequency of the last third lies against the first third."""
    signal = mono(audio)[: max(4096, round(end_of_sound(audio) * SAMPLE_RATE))]
    power = _spectrogram(signal, 2048, 1024)[:, 1:] ** 2
    octaves = np.log2(np.arange(1, power.shape[1] + 1))
    third = len(power) // 3
    first, last = ((part.sum(axis=0) @ octaves) / max(part.sum(), 1e-20) for part in (power[:third], power[-third:]))
    return "rising" if last > first else "falling"


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table: how many of the clips that a check applies to passed it, and the share that is asked for (None: told only)."""

    check: str
    passed: int
    count: int
    bound: float | None

    @property
    def share(self) -> float:
        return self.passed / self.count if self.count else 0.0

    @property
    def ok(self) -> bool:
        return self.bound is None or (self.count > 0 and self.share >= self.bound)


# check → the share of clips that must pass
BOUNDS: dict[str, float | None] = {
    "tempo within 3 %": 0.90,
    "pitch within 30 cents": 0.90,
    "instrument": 0.95,
    "key": None,
    "sweep direction": None,
    "ends within 0.1 s (sustained)": 0.95,
    "40 dB quieter after 0.1 s": 0.95,
}


def check(audio: np.ndarray, clip: Any) -> dict[str, tuple[bool, str]]:
    """The checks that apply to one uncropped clip → passed, and what was heard. `clip` has the fields of `golden.sounds.Clip`.

    Tempo and key are judged where the clip is long enough to tell: 2.5 s.
    """
    heard: dict[str, tuple[bool, str]] = {}
    kind, long_enough = clip.kind, clip.seconds >= 2.5
    if kind in TEMPO_KINDS and long_enough:
        bpm = tempo(audio, kind)
        heard["tempo within 3 %"] = abs(bpm / clip.bpm - 1) <= 0.03, f"{bpm:.1f} of {clip.bpm:g} BPM"
    if kind in PITCH_KINDS:
        off = cents(pitch(audio), clip.pitch)
        heard["pitch within 30 cents"] = abs(off) <= 30, f"{off:+.0f} cents"
    name = instrument(audio)
    heard["instrument"] = name == kind, name
    if kind == "arpeggio" and long_enough:
        root, scale = key(audio)
        heard["key"] = (root, scale) == (round(clip.pitch) % 12, clip.scale), f"{PITCH_CLASSES[root]} {scale}"
    if kind == "sweep":
        direction = sweep_direction(audio)
        heard["sweep direction"] = direction == ("rising" if clip.rising else "falling"), direction
    if kind in SUSTAINED:
        end = end_of_sound(audio)
        heard["ends within 0.1 s (sustained)"] = abs(end - clip.seconds) <= 0.1, f"{end:.2f} of {clip.seconds:.2f} s"
    if (clip.seconds + 0.15) * SAMPLE_RATE <= len(audio):
        quiet = silence_after(audio, clip.seconds)
        heard["40 dB quieter after 0.1 s"] = quiet <= -40, f"{quiet:.0f} dB"
    return heard


def table(results: Sequence[dict[str, tuple[bool, str]]]) -> list[Row]:
    """A row for every check, from the results of `check`."""
    rows = []
    for name, bound in BOUNDS.items():
        passed = [result[name][0] for result in results if name in result]
        rows.append(Row(name, sum(passed), len(passed), bound))
    return rows


def judge(audios: Sequence[np.ndarray], clips: Sequence[Any]) -> list[Row]:
    """The table for uncropped clips, each (frames, channels), and what was asked for (`golden.sounds.Clip` or its like)."""
    return table([check(audio, clip) for audio, clip in zip(audios, clips, strict=True)])


def format_table(rows: Sequence[Row]) -> str:
    lines = [f"{'check':<32}{'passed':>12}{'share':>9}{'bound':>8}"]
    for row in rows:
        bound = "" if row.bound is None else f"{row.bound:.0%}"
        verdict = "" if row.bound is None else "OK" if row.ok else "NOT OK"
        lines.append(
            f"{row.check:<32}{f'{row.passed} of {row.count}':>12}{row.share:>9.1%}{bound:>8}  {verdict}".rstrip()
        )
    return "\n".join(lines)
