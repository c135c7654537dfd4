"""The demo model's world: which sounds exist, what their captions say, and what is held out of its training.

`golden.render` makes them audible.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SAMPLE_RATE = 44100
HOP = 2048
FRAMES = 128
WINDOW = HOP * FRAMES  # 262144 samples, 5.944 s
MAX_SECONDS = WINDOW / SAMPLE_RATE

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

# measured on, so never in the training set: no clip has such a tempo, no tone is less than 5 cents from such a note
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
    """One sound: what a caption may say, and in `variation`, four numbers in 0..1, what the seed decides."""

    kind: str
    seconds: float
    bpm: float = 0.0
    note: int = 0  # MIDI number, of the root for arpeggios
    cents: float = 0.0
    scale: str = "minor"
    rising: bool = True
    variation: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5)

    @property
    def pitch(self) -> float:
        """MIDI number with its fraction."""
        return self.note + self.cents / 100


def caption(clip: Clip, rng: random.Random) -> str:
    """A caption as a user might write it: order and punctuation vary, letter case is folded by the tokenizer."""
    if clip.kind == "sweep":
        direction = "rising" if clip.rising else "falling"
        return rng.choice(
            ("white noise sweep, {}", "{} white noise sweep", "white noise sweep {}", "noise sweep, {}")
        ).format(direction)
    if clip.kind in DRUMS:
        name, value = DRUMS[clip.kind], f"{clip.bpm:g} BPM"
    elif clip.kind in TONES:
        name, value = TONES[clip.kind], note_name(clip.note) + (f" {clip.cents:+.0f} cents" if clip.cents else "")
    else:
        key = f"{PITCH_CLASSES[clip.note % 12]} {clip.scale}"
        name = rng.choice(
            ("pluck arpeggio, {}", "pluck arpeggio, {}", "pluck arpeggio in {}", "{} pluck arpeggio")
        ).format(key)
        value = f"{clip.bpm:g} BPM"
    templates = ("{n}, {v}", "{n}, {v}", "{v} {n}", "{v}, {n}", "{n} {v}", "{n} at {v}")
    return rng.choice(templates).format(n=name, v=value)


def draw(rng: random.Random, captioned: bool) -> Clip:
    """A training clip. A held-out tempo or note is never drawn.

    captioned: only what a caption can name (whole tempos; notes, detuned by whole cents); otherwise pitch
    and tempo are continuous, which the autoencoder needs and the text does not.
    """
    kind = rng.choice((*DRUMS, "hat", "house", *TONES, *TONES, "arpeggio", "arpeggio", "sweep"))
    seconds = MAX_SECONDS if rng.random() < 0.06 else rng.uniform(0.5, MAX_SECONDS)
    bpm, note, cents = 0.0, 0, 0.0
    if kind in DRUMS or kind == "arpeggio":
        bpm = draw_tempo(rng, 54, 190) if captioned else rng.uniform(54, 190)
        while round(bpm) in HELD_OUT_TEMPOS:
            bpm = rng.uniform(54, 190)
    if kind == "arpeggio":
        note = rng.randint(48, 59)
    elif kind in TONES:
        note, cents = draw_note(rng, 33, 86)
        if not captioned:
            cents = round(cents) + rng.uniform(-0.5, 0.5)
    variation = tuple(rng.random() for _ in range(4))
    return Clip(kind, seconds, bpm, note, cents, rng.choice(("minor", "major")), rng.random() < 0.5, variation)


def draw_tempo(rng: random.Random, low: int, high: int) -> float:
    """A whole tempo that is not held out."""
    while (bpm := rng.randint(low, high)) in HELD_OUT_TEMPOS:
        pass
    return float(bpm)


def draw_detuned(rng: random.Random, low: int, high: int) -> tuple[int, float]:
    """A MIDI number and a detuning of up to 75 cents, all as likely: a pitch that stands out is learnt by heart."""
    return rng.randint(low, high), float(rng.randint(-75, 75))


def draw_note(rng: random.Random, low: int, high: int) -> tuple[int, float]:
    """Likewise, but nothing less than 5 cents away from a held-out note: that one is only named out of tune."""
    held_out = [midi(name) for name in HELD_OUT_NOTES]
    while True:
        note, cents = draw_detuned(rng, low, high)
        if all(abs(note + cents / 100 - other) >= 0.0499 for other in held_out):
            return note, cents
