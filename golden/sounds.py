"""The demo model's world: which sounds exist, how they are rendered, what their captions say, what is held out.

Everything is drawn from a torch generator and rendered in batches on any device, so that a training set of thousands
of clips is made on a GPU in seconds and a single clip on a CPU for the checks.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch

SAMPLE_RATE = 44100
HOP = 2048
FRAMES = 128
WINDOW = HOP * FRAMES  # 262144 samples, 5.944 s
MAX_SECONDS = WINDOW / SAMPLE_RATE
# onsets sit on this grid (2.9 ms, as a control rate would have it): far below what the ear resolves
CONTROL_BLOCK = 128

PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
SCALES = {"minor": (0, 3, 7, 12), "major": (0, 4, 7, 12)}
DRUMS = {
    "kick": "kick drum loop",
    "snare": "snare drum loop",
    "hat": "hi-hat loop",
    "house": "house beat",
}
TONES = {"sine": "sine tone", "square": "square lead", "saw": "saw bass", "pluck": "plucked string"}
SUSTAINED = ("sine", "square", "saw", "sweep")
KINDS = (*DRUMS, *TONES, "arpeggio", "sweep")

# never in a training caption, for any instrument; measured on instead
HELD_OUT_TEMPOS = (
    63, 68, 74, 77, 82, 85, 89, 91, 96, 99, 104, 107, 113, 116, 122, 125, 131, 138, 140, 147, 152, 159, 165, 171, 176
)  # fmt: skip
HELD_OUT_NOTES = ("D2", "A#2", "C#3", "G3", "D#4", "F4", "A4", "C5", "E5", "G#5")


def midi(note: str) -> int:
    """MIDI number of a note name such as `F#3` (A4 = 69)."""
    return PITCH_CLASSES.index(note[:-1].upper()) + 12 * (int(note[-1]) + 1)


def note_name(number: int) -> str:
    return f"{PITCH_CLASSES[number % 12]}{number // 12 - 1}"


def frequency(number: float) -> float:
    """Hertz of a MIDI number, equal temperament, A4 = 440 Hz."""
    return 440.0 * 2.0 ** ((number - 69.0) / 12.0)


@dataclass(frozen=True)
class Clip:
    """One sound: what the caption may say (kind, tempo, pitch …) and what the seed decides (`variation`, four numbers in 0..1)."""

    kind: str
    seconds: float
    bpm: float = 0.0
    pitch: float = 0.0  # MIDI number, of the root for arpeggios
    scale: str = "minor"
    rising: bool = True
    variation: tuple[float, float, float, float] = field(default=(0.5, 0.5, 0.5, 0.5))


def caption(clip: Clip, rng: random.Random) -> str:
    """A caption as a user might write it: order and punctuation vary, letter case is folded by the tokenizer."""
    if clip.kind == "sweep":
        direction = "rising" if clip.rising else "falling"
        return rng.choice(("white noise sweep, {}", "{} white noise sweep", "white noise sweep {}", "noise sweep, {}")).format(
            direction
        )
    if clip.kind in DRUMS:
        name, value = DRUMS[clip.kind], f"{clip.bpm:g} BPM"
    elif clip.kind in TONES:
        nearest = round(clip.pitch)
        cents = round(100 * (clip.pitch - nearest))
        name, value = TONES[clip.kind], note_name(nearest) + (f" {cents:+d} cents" if cents else "")
    else:
        key = f"{PITCH_CLASSES[round(clip.pitch) % 12]} {clip.scale}"
        name = rng.choice(("pluck arpeggio, {}", "pluck arpeggio, {}", "pluck arpeggio in {}", "{} pluck arpeggio")).format(key)
        value = f"{clip.bpm:g} BPM"
    templates = ("{n}, {v}", "{n}, {v}", "{v} {n}", "{v}, {n}", "{n} {v}", "{n} at {v}")
    return rng.choice(templates).format(n=name, v=value)


def draw(rng: random.Random, captioned: bool) -> Clip:
    """A training clip. Held-out tempos and notes are never drawn, nor, for tones, any pitch within 40 cents of a held-out note.

    captioned: only what a caption can name (whole tempos; notes, a quarter of them detuned by whole cents); otherwise
    pitch and tempo are continuous, which the autoencoder needs and the text does not.
    """
    kind = rng.choice(("kick", "snare", "hat", "house", "house", "sine", "square", "saw", "pluck", "arpeggio", "arpeggio", "sweep"))
    seconds = MAX_SECONDS if rng.random() < 0.06 else rng.uniform(0.5, MAX_SECONDS)
    variation = tuple(rng.random() for _ in range(4))
    bpm = pitch = 0.0
    if kind in DRUMS or kind == "arpeggio":
        bpm = float(rng.randint(54, 190)) if captioned else rng.uniform(54, 190)
        while round(bpm) in HELD_OUT_TEMPOS:
            bpm = float(rng.randint(54, 190)) if captioned else rng.uniform(54, 190)
    if kind == "arpeggio":
        pitch = float(rng.randint(48, 59))
    elif kind in TONES:
        pitch = _draw_pitch(rng, captioned)
    scale = rng.choice(("minor", "major"))
    return Clip(kind, seconds, bpm, pitch, scale, rng.random() < 0.5, variation)  # type: ignore[arg-type]


def _draw_pitch(rng: random.Random, captioned: bool) -> float:
    held_out = [midi(name) for name in HELD_OUT_NOTES]
    while True:
        pitch = float(rng.randint(33, 86)) if captioned else rng.uniform(33, 86)
        if captioned and rng.random() < 0.35:
            pitch += rng.randint(-50, 50) / 100
        if all(abs(pitch - note) > 0.4 for note in held_out):
            return pitch


# --- rendering ------------------------------------------------------------------------------------------------------


def render(clips: list[Clip], device: torch.device | str = "cpu") -> torch.Tensor:
    """Stereo float32 audio (B, 2, WINDOW) in -1..1; each clip is silent from its `seconds` on."""
    out = torch.zeros(len(clips), 2, WINDOW, device=device)
    for kind in KINDS:
        rows = [i for i, clip in enumerate(clips) if clip.kind == kind]
        if rows:
            out[rows] = _RENDERERS[kind]([clips[i] for i in rows], torch.device(device))
    seconds = _column(clips, "seconds", out.device)
    # a clip ends with a 10 ms fade that reaches zero at its end
    fade = ((seconds - _time(out.device)) / 0.010).clamp(0, 1)
    return out * torch.where(seconds[:, :1] >= MAX_SECONDS - 1e-6, 1.0, fade)[:, None, :]


def _time(device: torch.device, samples: int = WINDOW) -> torch.Tensor:
    return torch.arange(samples, device=device, dtype=torch.float32) / SAMPLE_RATE


def _column(clips: list[Clip], name: str, device: torch.device) -> torch.Tensor:
    return torch.tensor([getattr(clip, name) for clip in clips], device=device, dtype=torch.float32)[:, None]


def _vary(clips: list[Clip], index: int, low: float, high: float, device: torch.device) -> torch.Tensor:
    values = torch.tensor([clip.variation[index] for clip in clips], device=device, dtype=torch.float32)[:, None]
    return low + (high - low) * values


def _pan(mono: torch.Tensor, left: float, right: float) -> torch.Tensor:
    return torch.stack((left * mono, right * mono), dim=1)


def _noise(samples: int, seed: int, device: torch.device) -> torch.Tensor:
    """The same white noise for every clip: a drum machine's sample, not a new one at every hit."""
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)).to(device)


def _kick_hit(clips: list[Clip], device: torch.device) -> torch.Tensor:
    t = _time(device, 16384)
    base, decay = _vary(clips, 0, 46, 58, device), _vary(clips, 1, 0.07, 0.12, device)
    punch, drop = 130.0, 0.028
    phase = 2 * math.pi * (base * t + punch * drop * (1 - torch.exp(-t / drop)))
    end = ((16384 / SAMPLE_RATE - t) / 0.02).clamp(0, 1)
    return 0.85 * torch.sin(phase) * torch.exp(-t / decay) * (t / 0.0005).clamp(0, 1) * end


def _snare_hit(clips: list[Clip], device: torch.device) -> torch.Tensor:
    t = _time(device, 12288)
    tune, snappy = _vary(clips, 0, 0.94, 1.06, device), _vary(clips, 1, 0.045, 0.07, device)
    body = sum(
        gain * torch.sin(2 * math.pi * hertz * tune * t) * torch.exp(-t / 0.05) for hertz, gain in ((185.0, 0.5), (331.0, 0.35))
    )
    rattle = _noise(12288, 11, device)
    rattle = rattle - torch.nn.functional.avg_pool1d(rattle[None, None], 9, 1, 4)[0, 0]
    return 0.6 * (body + 0.28 * rattle * torch.exp(-t / snappy)) * (t / 0.0005).clamp(0, 1)


def _hat_hit(clips: list[Clip], device: torch.device) -> torch.Tensor:
    """Six detuned square waves high-passed, as analogue drum machines make their hats."""
    t = _time(device, 6144)
    decay = _vary(clips, 2, 0.02, 0.035, device)
    metal = sum(torch.sign(torch.sin(2 * math.pi * hertz * 5.3 * t)) for hertz in (205.3, 304.4, 369.6, 522.7, 540.0, 800.0))
    for _ in range(2):
        metal = metal - torch.nn.functional.avg_pool1d(metal[None, None], 5, 1, 2)[0, 0]
    return 0.22 * metal * torch.exp(-t / decay) * (t / 0.0003).clamp(0, 1)


def _repeat(hits: torch.Tensor, clips: list[Clip], offset: float, per_beat: float) -> torch.Tensor:
    """Place a hit (B, L) at every 1/per_beat of a beat, from `offset` beats on → (B, WINDOW)."""
    impulses = torch.zeros(len(clips), WINDOW, device=hits.device)
    for row, clip in enumerate(clips):
        for onset in _onsets(clip, offset, per_beat):
            impulses[row, onset] = 1.0
    return _convolve(impulses, hits)


def _onsets(clip: Clip, offset: float, per_beat: float) -> list[int]:
    step = 60.0 / clip.bpm / per_beat
    first = offset * 60.0 / clip.bpm
    count = max(0, math.ceil((min(clip.seconds, MAX_SECONDS) - first) / step))
    grid = (round((first + i * step) * SAMPLE_RATE / CONTROL_BLOCK) * CONTROL_BLOCK for i in range(count))
    return [onset for onset in grid if onset < WINDOW]


def _convolve(impulses: torch.Tensor, hits: torch.Tensor) -> torch.Tensor:
    size = 2 * WINDOW
    return torch.fft.irfft(torch.fft.rfft(impulses, size) * torch.fft.rfft(hits, size), size)[:, :WINDOW]


def _kick(clips: list[Clip], device: torch.device) -> torch.Tensor:
    return _pan(_repeat(_kick_hit(clips, device), clips, 0.0, 1.0), 1.0, 1.0)


def _snare(clips: list[Clip], device: torch.device) -> torch.Tensor:
    return _pan(_repeat(_snare_hit(clips, device), clips, 0.0, 1.0), 1.0, 0.8)


def _hat(clips: list[Clip], device: torch.device) -> torch.Tensor:
    return _pan(_repeat(_hat_hit(clips, device), clips, 0.0, 1.0), 0.75, 1.0)


def _house(clips: list[Clip], device: torch.device) -> torch.Tensor:
    hats = _pan(_repeat(_hat_hit(clips, device), clips, 0.5, 1.0), 0.6, 0.8)
    return 0.9 * (_kick(clips, device) + hats)


def _partials(clips: list[Clip], device: torch.device, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Harmonic numbers (count, 1, 1) and the fundamental (B, 1), in hertz."""
    hertz = 440.0 * torch.exp2((_column(clips, "pitch", device).double() - 69.0) / 12.0)
    return torch.arange(1, count + 1, device=device, dtype=torch.float32)[:, None, None], hertz


def _additive(clips: list[Clip], device: torch.device, weights, count: int) -> torch.Tensor:
    """Sum of harmonics k·f with `weights(k, k·f, t)`, band-limited below 16 kHz, every phase zero at the start."""
    numbers, hertz = _partials(clips, device, count)
    t = _time(device)
    cycles = hertz * t.double()  # float32 would lose the phase after a second
    out = torch.zeros(len(clips), WINDOW, device=device)
    for k in range(1, count + 1):
        k_hertz = (k * hertz).float()
        gain = weights(k, k_hertz, t) * (k_hertz < 16000)
        out += gain * torch.sin(2 * math.pi * torch.frac(k * cycles)).float()
    return out


def _attack(device: torch.device, seconds: float) -> torch.Tensor:
    return (_time(device) / seconds).clamp(0, 1)


def _sine(clips: list[Clip], device: torch.device) -> torch.Tensor:
    level = _vary(clips, 0, 0.4, 0.6, device)
    tone = level * _additive(clips, device, lambda k, f, t: torch.ones_like(f), 1)
    return _pan(tone * _attack(device, 0.008), 1.0, 1.0)


def _square(clips: list[Clip], device: torch.device) -> torch.Tensor:
    cutoff = _vary(clips, 1, 2500, 5000, device)
    tone = _additive(clips, device, lambda k, f, t: (k % 2) / k / (1 + (f / cutoff) ** 2), 31)
    return _pan(_vary(clips, 0, 0.35, 0.5, device) * tone * _attack(device, 0.008), 0.9, 1.0)


def _saw(clips: list[Clip], device: torch.device) -> torch.Tensor:
    cutoff = _vary(clips, 1, 1500, 3000, device)
    tone = _additive(clips, device, lambda k, f, t: 1 / k / (1 + (f / cutoff) ** 2), 32)
    return _pan(_vary(clips, 0, 0.35, 0.5, device) * tone * _attack(device, 0.008), 1.0, 0.9)


def _string(clips: list[Clip], device: torch.device, count: int = 16) -> torch.Tensor:
    """A plucked string: harmonics of 1/k, the higher the quicker gone."""
    bright = _vary(clips, 1, 0.8, 1.4, device)
    numbers = _additive(clips, device, lambda k, f, t: k**-1.2 * torch.exp(-t * (1.6 + 1.1 * (k - 1) / bright)), count)
    return _vary(clips, 0, 0.4, 0.55, device) * numbers * _attack(device, 0.002)


def _pluck(clips: list[Clip], device: torch.device) -> torch.Tensor:
    return _pan(_string(clips, device), 1.0, 0.75)


def _arpeggio(clips: list[Clip], device: torch.device) -> torch.Tensor:
    """Root, third, fifth and octave, plucked in turn on every half beat; each note stops the one before."""
    out = torch.zeros(len(clips), WINDOW, device=device)
    strings = [
        _string([_transposed(clip, SCALES[clip.scale][degree]) for clip in clips], device, 8) for degree in range(4)
    ]
    for row, clip in enumerate(clips):
        onsets = [*_onsets(clip, 0.0, 2.0), WINDOW]
        for i, (start, stop) in enumerate(zip(onsets, onsets[1:], strict=False)):
            length = min(stop - start, WINDOW - start)
            note = strings[i % 4][row, :length].clone()
            damp = min(512, length)
            note[-damp:] *= torch.linspace(1, 0, damp, device=device)
            out[row, start : start + length] = note
    return _pan(out, 0.75, 1.0)


def _transposed(clip: Clip, semitones: int) -> Clip:
    return Clip(clip.kind, clip.seconds, clip.bpm, clip.pitch + semitones, clip.scale, clip.rising, clip.variation)


def _sweep(clips: list[Clip], device: torch.device) -> torch.Tensor:
    """White noise, a 370 ms loop, through a band that glides 300 → 9000 Hz (or back) over the clip."""
    size, hop = 1024, 256
    noise = _noise(16384, 23, device).repeat(WINDOW // 16384)
    window = torch.hann_window(size, device=device)
    spectrum = torch.stft(noise, size, hop, window=window, return_complex=True)  # (F, N)
    progress = (torch.arange(spectrum.shape[1], device=device) * hop / SAMPLE_RATE / _column(clips, "seconds", device)).clamp(0, 1)
    rising = torch.tensor([clip.rising for clip in clips], device=device)[:, None]
    centre = math.log2(300) + math.log2(9000 / 300) * torch.where(rising, progress, 1 - progress)
    octaves = torch.log2(torch.arange(spectrum.shape[0], device=device).clamp(min=0.5) * SAMPLE_RATE / size)
    gain = torch.exp(-0.5 * ((octaves[None, :, None] - centre[:, None, :]) / 0.55) ** 2)
    gain = gain / (gain.square().sum(1, keepdim=True) / spectrum.shape[0]).sqrt().clamp(min=1e-6)
    swept = torch.istft(spectrum[None] * gain, size, hop, window=window, length=WINDOW)
    return _pan(0.16 * swept * _attack(device, 0.008), 1.0, 1.0)


_RENDERERS = {
    "kick": _kick,
    "snare": _snare,
    "hat": _hat,
    "house": _house,
    "sine": _sine,
    "square": _square,
    "saw": _saw,
    "pluck": _pluck,
    "arpeggio": _arpeggio,
    "sweep": _sweep,
}
