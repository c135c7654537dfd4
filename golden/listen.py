"""Do the clips sound like what was asked for? Checks by signal analysis, counted in a table.

The analysis does not see the prompt; only the comparison does. Needs no torch: `held_out`, which writes prompts with
`golden.sounds`, imports it when called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .analysis import (
    SAMPLE_RATE,
    cents,
    end_of_sound,
    instrument,
    key,
    pitch,
    silence_after,
    sweep_direction,
    tempo,
)

TEMPO_KINDS = ("kick", "snare", "hat", "house", "arpeggio")
PITCH_KINDS = ("sine", "square", "saw", "pluck")
SUSTAINED = ("sine", "square", "saw", "sweep")
# a slow loop in a shorter clip has two onsets, which tell no tempo, and an arpeggio two notes, which tell no key
LONG_ENOUGH = 2.5

TEMPO, PITCH, INSTRUMENT, KEY, DIRECTION, END, QUIET = (
    "tempo within 3 %",
    "pitch within 30 cents",
    "instrument",
    "key of arpeggios",
    "direction of sweeps",
    "sustained end within 0.1 s",
    "40 dB quieter 0.1 s later",
)
# the share of clips that must pass; None is told only
BOUNDS = {TEMPO: 0.90, PITCH: 0.90, INSTRUMENT: 0.95, KEY: None, DIRECTION: None, END: 0.95, QUIET: 0.95}


@dataclass(frozen=True)
class Heard:
    """One check of one clip: whether it passed, and what was heard, in words."""

    passed: bool
    what: str


@dataclass(frozen=True)
class Row:
    """One line of the table: of the clips that a check applies to, how many passed, and the share that must."""

    check: str
    passed: int
    count: int
    bound: float | None

    @property
    def share(self) -> float:
        return self.passed / self.count if self.count else 0.0

    @property
    def ok(self) -> bool:
        """A check that no clip was there for has not been passed."""
        return self.bound is None or (self.count > 0 and self.share >= self.bound)


def listen(audio: np.ndarray, clip: Any) -> dict[str, Heard]:
    """The checks that apply to uncropped audio (frames, channels) of what a `golden.sounds.Clip` or its like asked for."""
    heard, name = {}, instrument(audio)
    heard[INSTRUMENT] = Heard(name == clip.kind, name)
    if clip.kind in TEMPO_KINDS and clip.seconds >= LONG_ENOUGH:
        bpm = tempo(audio, clip.kind)
        heard[TEMPO] = Heard(abs(bpm / clip.bpm - 1) <= 0.03, f"{bpm:.1f} BPM, not {clip.bpm:g}")
    if clip.kind in PITCH_KINDS:
        off = cents(pitch(audio), clip.pitch)
        heard[PITCH] = Heard(abs(off) <= 30, f"{off:+.0f} cents")
    if clip.kind == "arpeggio" and clip.seconds >= LONG_ENOUGH:
        root, scale = key(audio)
        heard[KEY] = Heard((root, scale) == (round(clip.pitch) % 12, clip.scale), f"{scale} on pitch class {root}")
    if clip.kind == "sweep":
        direction = sweep_direction(audio)
        heard[DIRECTION] = Heard(direction == ("rising" if clip.rising else "falling"), direction)
    if clip.kind in SUSTAINED:
        end = end_of_sound(audio)
        heard[END] = Heard(abs(end - clip.seconds) <= 0.1, f"ends at {end:.2f} s, not {clip.seconds:.2f}")
    if len(audio) >= (clip.seconds + 0.12) * SAMPLE_RATE:
        left = silence_after(audio, clip.seconds)
        heard[QUIET] = Heard(left <= -40, f"{left:.0f} dB after the end")
    return heard


def table(heard: Sequence[dict[str, Heard]]) -> list[Row]:
    """A row for every check, over what `listen` heard of many clips."""
    rows = []
    for check, bound in BOUNDS.items():
        passed = [clip[check].passed for clip in heard if check in clip]
        rows.append(Row(check, sum(passed), len(passed), bound))
    return rows


def judge(audios: Sequence[np.ndarray], clips: Sequence[Any]) -> list[Row]:
    """The table for many clips; arguments as in `listen`."""
    return table([listen(audio, clip) for audio, clip in zip(audios, clips, strict=True)])


def format_table(rows: Sequence[Row]) -> str:
    lines = [f"{'check':<28}{'passed':>12}{'share':>9}{'bound':>8}"]
    for row in rows:
        line = f"{row.check:<28}{f'{row.passed} of {row.count}':>12}{row.share:>9.1%}"
        lines.append(line if row.bound is None else f"{line}{row.bound:>8.0%}  {'OK' if row.ok else 'NOT OK'}")
    return "\n".join(lines)
