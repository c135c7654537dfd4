"""What a caption says, as numbers: what T5's states are to be while the demo model trains.

Left to the diffusion loss alone, text learns instruments in minutes, numbers hardly at all, and notes by heart: an
unseen note then means anything. So every token's state is held to the caption's attributes in its first SIZE places and
to zero in the rest: a note that was never heard differs from its neighbours only as their pitches do. The lesson is
text alone, as a language model's would be: it ranges wider than the sounds do, and it spells the notes that are held
out from them, though not the tempos.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from golden import sounds

_TEMPO_WAVES = (1, 2, 4)
_CLASS_WAVES = (1, 2, 3, 4, 5, 6, 12)
SIZE = len(sounds.KINDS) + 2 + 1 + 2 * len(_TEMPO_WAVES) + 2 + 2 * len(_CLASS_WAVES)


def draw(rng: random.Random) -> sounds.Clip:
    """A clip to caption, never to render: tempos from 20 to 299 that are not held out, every note from C0 to B9."""
    clip = sounds.draw(rng, captioned=True)
    if clip.bpm and rng.random() < 0.5:
        return replace(clip, bpm=sounds.draw_tempo(rng, 20, 299))
    if clip.kind in sounds.TONES and rng.random() < 0.75:
        low, high = rng.choice(((12, 131), (33, 86)))
        note, cents = sounds.draw_detuned(rng, low, high)
        return replace(clip, note=note, cents=cents * rng.choice((0, 1)))
    return clip


def _waves(x: float, counts: tuple[int, ...]) -> list[float]:
    return [f(2 * math.pi * count * x) for count in counts for f in (math.sin, math.cos)]


def attributes(clip: sounds.Clip) -> list[float]:
    """SIZE numbers between about -2 and 2; zero where the caption says nothing of the kind."""
    tempo, tone = clip.bpm > 0, clip.note > 0
    values = [float(clip.kind == name) for name in sounds.KINDS]
    values += [(2.0 * clip.rising - 1) * (clip.kind == "sweep")]
    values += [(2.0 * (clip.scale == "minor") - 1) * (clip.kind == "arpeggio")]
    u = math.log2(max(clip.bpm, 20) / 54) / math.log2(190 / 54)
    values += [tempo * x for x in (2 * u - 1, *_waves(u, _TEMPO_WAVES))]
    return values + [
        tone * x for x in ((clip.pitch - 60) / 24, clip.note // 12 - 5, *_waves(clip.pitch / 12, _CLASS_WAVES))
    ]
