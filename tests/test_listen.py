"""The sound checks hear what is there, on sounds written here, apart from the code that renders the training set."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from golden import analysis, listen
from mlx_audio_native import load
from mlx_audio_native.model import DEMO

RATE = 44100
RNG = np.random.default_rng(5)
NOISE = RNG.standard_normal(7 * RATE)


A_CLIP_EACH = [
    ("kick drum loop, 122 BPM", SimpleNamespace(kind="kick", bpm=122, seconds=4.3)),
    ("82 bpm snare drum loop", SimpleNamespace(kind="snare", bpm=82, seconds=5.2)),
    ("HI-HAT LOOP, 152 BPM", SimpleNamespace(kind="hat", bpm=152, seconds=2.7)),
    ("house beat, 125 BPM", SimpleNamespace(kind="house", bpm=125, seconds=3.9)),
    ("sine tone, A4", SimpleNamespace(kind="sine", pitch=69, seconds=1.6)),
    ("C#3 Square Lead", SimpleNamespace(kind="square", pitch=49, seconds=4.1)),
    ("saw bass, d2", SimpleNamespace(kind="saw", pitch=38, seconds=2.4)),
    ("plucked string, G3", SimpleNamespace(kind="pluck", pitch=55, seconds=3.3)),
    (
        "pluck arpeggio, A minor, 113 BPM",
        SimpleNamespace(kind="arpeggio", bpm=113, note=57, scale="minor", seconds=4.8),
    ),
    ("white noise sweep, rising", SimpleNamespace(kind="sweep", rising=True, seconds=5.4)),
]


def seconds(duration: float) -> np.ndarray:
    return np.arange(round(duration * RATE)) / RATE


def hit(kind: str) -> np.ndarray:
    t = seconds(0.25)
    if kind == "kick":
        return np.sin(2 * np.pi * (50 * t + 4 * (1 - np.exp(-t / 0.03)))) * np.exp(-t / 0.09)
    if kind == "snare":
        body = np.sin(2 * np.pi * 190 * t) + 0.6 * np.sin(2 * np.pi * 330 * t)
        return (0.4 * body + 0.15 * NOISE[: len(t)]) * np.exp(-t / 0.05)
    return 0.15 * sum(np.sin(2 * np.pi * hertz * t) for hertz in (5300, 6400, 7700, 9100)) * np.exp(-t / 0.04)


def loop(sound: np.ndarray, bpm: float, duration: float, first: float = 0.0) -> np.ndarray:
    out = np.zeros(round(duration * RATE) + len(sound))
    for onset in np.arange(first * 60 / bpm, duration, 60 / bpm):
        start = round(onset * RATE)
        out[start : start + len(sound)] += sound
    return out[: round(duration * RATE)]


def tone(kind: str, hertz: float, duration: float) -> np.ndarray:
    t = seconds(duration)
    gains = {
        "sine": {1: 1.0},
        "square": {k: 1 / k for k in range(1, 20, 2)},
        "saw": {k: 1 / k for k in range(1, 20)},
        "pluck": {k: k**-1.2 for k in range(1, 12)},
    }[kind]
    falling = 1.0 if kind == "pluck" else 0.0
    partials = (
        gain * np.exp(-falling * t * (1.5 + k)) * np.sin(2 * np.pi * k * hertz * t) / (1 + (k * hertz / 3000) ** 2)
        for k, gain in gains.items()
        if k * hertz < 16000
    )
    return 0.4 * sum(partials)


def hertz_of(note: float) -> float:
    return 440 * 2 ** ((note - 69) / 12)


def arpeggio(root: int, third: int, bpm: float, duration: float) -> np.ndarray:
    notes = [tone("pluck", hertz_of(root + step), 30 / bpm) for step in (0, third, 7, 12)]
    for note in notes:
        note[-400:] *= np.linspace(1, 0, 400)
    return np.concatenate([notes[i % 4] for i in range(int(duration * bpm / 30) + 1)])[: round(duration * RATE)]


def sweep(rising: bool, duration: float) -> np.ndarray:
    """Noise through a band of an octave that glides five octaves, block by block."""
    size = 2048
    starts = range(0, round(duration * RATE) - size, size // 2)
    out, octaves = np.zeros(round(duration * RATE)), np.log2(np.arange(size // 2 + 1).clip(0.5) * RATE / size)
    for i, start in enumerate(starts):
        centre = 8.2 + 5 * (i if rising else len(starts) - 1 - i) / len(starts)
        block = np.fft.rfft(NOISE[start : start + size] * np.hanning(size)) * np.exp(-2 * (octaves - centre) ** 2)
        block = np.fft.irfft(block)
        out[start : start + size] += 0.1 * block / block.std()
    return out


def sound(kind: str, duration: float, bpm: float = 120.0, note: float = 57.0) -> np.ndarray:
    if kind in ("kick", "snare", "hat"):
        return loop(hit(kind), bpm, duration)
    if kind == "house":
        return loop(hit("kick"), bpm, duration) + 0.7 * loop(hit("hat"), bpm, duration, first=0.5)
    if kind == "arpeggio":
        return arpeggio(round(note), 3, bpm, duration)
    if kind == "sweep":
        return sweep(True, duration)
    return tone(kind, hertz_of(note), duration)


def clip_audio(mono: np.ndarray, noise_db: float | None = None) -> np.ndarray:
    """Stereo in a window of 5.944 s, a little to the left; noise `noise_db` below the sound for as long as it lasts."""
    if noise_db is not None:
        rms = np.sqrt(np.square(mono[np.abs(mono) > 0.1 * np.abs(mono).max()]).mean())
        mono = mono + RNG.standard_normal(len(mono)) * rms * 10 ** (-noise_db / 20)
    out = np.zeros((262144, 2))
    out[: len(mono)] = mono[:, None] * (1.0, 0.8)
    return out


@pytest.mark.parametrize("noise_db", [None, 25])
@pytest.mark.parametrize("kind", listen.TEMPO_KINDS)
def test_tempo(kind, noise_db):
    for bpm, duration in ((54, 2.5), (63, 4), (120, 5.5), (190, 2.6)):
        audio = clip_audio(sound(kind, duration, bpm=bpm), noise_db)
        assert analysis.tempo(audio, kind) == pytest.approx(bpm, rel=0.005), (bpm, duration)


@pytest.mark.parametrize("noise_db", [None, 25])
@pytest.mark.parametrize("kind", listen.PITCH_KINDS)
def test_pitch(kind, noise_db):
    for note in (36, 43.3, 58, 69, 76.75, 83):
        audio = clip_audio(sound(kind, 1.2, note=note), noise_db)
        assert abs(analysis.cents(analysis.pitch(audio), note)) < 5, note


@pytest.mark.parametrize("noise_db", [None, 25])
@pytest.mark.parametrize("kind", [*listen.TEMPO_KINDS, *listen.PITCH_KINDS, "sweep"])
def test_instrument(kind, noise_db):
    for duration, bpm, note in ((1.0, 170, 40), (3.0, 62, 60), (5.5, 110, 76)):
        audio = clip_audio(sound(kind, duration, bpm, min(note, 60) if kind == "arpeggio" else note), noise_db)
        assert analysis.instrument(audio) == kind, (duration, bpm, note)


@pytest.mark.parametrize(("third", "scale"), [(3, "minor"), (4, "major")])
def test_key(third, scale):
    for root in range(48, 60):
        assert analysis.key(clip_audio(arpeggio(root, third, 150, 3))) == (root % 12, scale)


def test_sweep_direction():
    assert analysis.sweep_direction(clip_audio(sweep(True, 2.5))) == "rising"
    assert analysis.sweep_direction(clip_audio(sweep(False, 2.5))) == "falling"


@pytest.mark.parametrize("kind", listen.SUSTAINED)
def test_end_of_sound(kind):
    for duration in (1.0, 3.21, 5.5):
        audio = clip_audio(sound(kind, duration), 25)
        assert analysis.end_of_sound(audio) == pytest.approx(duration, abs=0.03)


def test_silence_after():
    audio = clip_audio(tone("sine", 220, 2.0))
    audio[round(2.05 * RATE) : round(2.09 * RATE)] = 0.4  # inside the margin
    assert analysis.silence_after(audio, 2.0) < -100
    audio[round(4.0 * RATE) : round(4.02 * RATE)] += 0.004  # one short click of -37 dB
    assert analysis.silence_after(audio, 2.0) == pytest.approx(-37, abs=2)


def test_what_was_not_asked_for_fails():
    """Half and double tempo, a semitone, a late end and a noisy silence are each told apart from what passes."""

    def passed(check, audio, **asked):
        return listen.listen(audio, SimpleNamespace(**asked))[check].passed

    drums = clip_audio(sound("hat", 4, bpm=120))
    assert [passed(listen.TEMPO, drums, kind="hat", bpm=bpm, seconds=4) for bpm in (120, 123, 60, 240, 125)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    saw = clip_audio(sound("saw", 3, note=50))
    assert passed(listen.PITCH, saw, kind="saw", pitch=50.25, seconds=3)
    assert not passed(listen.PITCH, saw, kind="saw", pitch=51, seconds=3)
    assert not passed(listen.PITCH, saw, kind="saw", pitch=62, seconds=3)
    assert passed(listen.END, saw, kind="saw", pitch=50, seconds=3.08)
    assert not passed(listen.END, saw, kind="saw", pitch=50, seconds=3.15)
    assert not passed(listen.END, saw, kind="saw", pitch=50, seconds=2.85)
    assert passed(listen.QUIET, saw, kind="saw", pitch=50, seconds=3)
    assert not passed(listen.QUIET, saw, kind="saw", pitch=50, seconds=2.8)
    assert not passed(listen.INSTRUMENT, saw, kind="square", pitch=50, seconds=3)


def test_silence_passes_nothing():
    silence = np.zeros((262144, 2))
    for kind in (*listen.TEMPO_KINDS, *listen.PITCH_KINDS):
        clip = SimpleNamespace(kind=kind, seconds=3.0, bpm=100.0, pitch=57.0, note=57, scale="minor")
        assert not any(heard.passed for heard in listen.listen(silence, clip).values())


@pytest.mark.parametrize("audio", [np.full((262144, 2), np.nan), np.zeros((0, 2))])
def test_unusable_audio(audio):
    with pytest.raises(ValueError, match="empty or not finite"):
        analysis.instrument(audio)


def test_judge_counts():
    clips = [SimpleNamespace(kind="sine", pitch=pitch, seconds=2.0) for pitch in (57.0, 57.0, 60.0)]
    rows = {row.check: row for row in listen.judge([clip_audio(sound("sine", 2.0))] * 3, clips)}
    assert (rows[listen.PITCH].passed, rows[listen.PITCH].count, rows[listen.PITCH].ok) == (2, 3, False)
    assert (rows[listen.INSTRUMENT].passed, rows[listen.INSTRUMENT].ok) == (3, True)
    assert not rows[listen.TEMPO].ok  # nothing had a tempo: that is no success
    assert "2 of 3" in listen.format_table(list(rows.values()))


def test_raw_seconds_is_the_other_ports_formula(small_folder: Path):
    original = (small_folder / "config.json").read_bytes()
    with listen.raw_seconds(small_folder) as folder:
        embedder = load(folder, parts=("conditioner",)).conditioner.numbers["seconds_total"]
    assert (small_folder / "config.json").read_bytes() == original
    angles = 2 * np.pi * 10 * np.array(embedder.frequencies, np.float64)
    features = np.concatenate([np.cos(angles), np.sin(angles), [10.0]])
    expected = features @ np.array(embedder.weight, np.float64).T + np.array(embedder.bias)
    np.testing.assert_allclose(np.array(embedder(mx.array([10.0])))[0], expected, rtol=1e-4, atol=1e-4)


def test_the_checks_need_no_torch():
    script = "import sys, golden.listen; print([m for m in ('torch', 'scipy', 'mlx.core') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_embedded_model_makes_what_it_is_asked_for():
    """Tempos and notes that were held out of its training; one clip may fail where several were checked."""
    rows = listen.judge(list(listen.render(DEMO, A_CLIP_EACH, seed=0)), [clip for _, clip in A_CLIP_EACH])
    for row in rows:
        assert row.count and row.count - row.passed <= (row.count > 1), listen.format_table(rows)


def test_embedded_model_with_the_other_ports_seconds_formula():
    """The sound no longer ends when it should: this is what the seconds formula is worth."""
    sustained = [(prompt, clip) for prompt, clip in A_CLIP_EACH if clip.kind in listen.SUSTAINED]
    with listen.raw_seconds(DEMO) as folder:
        rows = listen.judge(list(listen.render(folder, sustained, seed=0)), [clip for _, clip in sustained])
    ends = next(row for row in rows if row.check == listen.END)
    assert ends.share < 0.5, listen.format_table(rows)
