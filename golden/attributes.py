"""What a caption says, as numbers: the targets that T5's states are held to while the demo model trains.

Left to the diffusion loss alone, text learns instruments in minutes, numbers hardly at all, and notes by heart: an
unseen note then means anything. A linear reading of every token's state towards these targets, dropped after training,
gives tempo and pitch a smooth place in the embedding. The lesson is text alone, as a language model's would be: it
ranges wider than the sounds do, and it spells the notes that are held out from them, though not the tempos.
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
        return replace(clip, note=note, cents=cents)
    return clip


def _waves(x: float, counts: tuple[int, ...]) -> list[float]:
    return [f(2 * math.pi * count * x) for count in counts for f in (math.sin, math.cos)]


def attributes(clip: sounds.Clip) -> tuple[list[float], list[float]]:
    """Targets (SIZE,) and their weights, zero where the caption says nothing of the kind."""
    targets = [float(clip.kind == name) for name in sounds.KINDS]
    targets += [2.0 * clip.rising - 1, 2.0 * (clip.scale == "minor") - 1]
    weights = [1.0] * len(sounds.KINDS) + [float(clip.kind == "sweep"), float(clip.kind == "arpeggio")]
    u = math.log2(max(clip.bpm, 20) / 54) / math.log2(190 / 54)
    targets += [2 * u - 1, *_waves(u, _TEMPO_WAVES)]
    weights += [float(clip.bpm > 0)] * (1 + 2 * len(_TEMPO_WAVES))
    targets += [(clip.pitch - 60) / 24, clip.note // 12 - 5, *_waves(clip.pitch / 12, _CLASS_WAVES)]
    weights += [float(clip.note > 0)] * (2 + 2 * len(_CLASS_WAVES))
    return targets, weights
