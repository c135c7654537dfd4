"""`python -m golden listen`: do the clips of a model sound like what was asked for? Counted in a table.

The analysis does not see the prompt; only the comparison does.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
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
    """The checks that apply to `clip`, a golden.sounds.Clip or its like, on its uncropped audio (frames, channels)."""
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
        heard[KEY] = Heard((root, scale) == (clip.note % 12, clip.scale), f"{scale} on pitch class {root}")
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


# --- the command ----------------------------------------------------------------------------------------------------


def held_out(count: int, seed: int) -> list[tuple[str, Any]]:
    """`count` prompts and what each asks for, a golden.sounds.Clip, with 1 to 5.5 seconds.

    Every held-out tempo with every rhythm, every held-out note with every tone, and a few sweeps; in random order, over
    again if there are too few. Word order, letter case, keys and seconds are random.
    """
    from . import sounds

    rng = random.Random(seed)
    wanted = [{"kind": kind, "bpm": float(bpm)} for kind in TEMPO_KINDS for bpm in sounds.HELD_OUT_TEMPOS]
    wanted += [{"kind": kind, "note": sounds.midi(n)} for kind in PITCH_KINDS for n in sounds.HELD_OUT_NOTES]
    wanted += [{"kind": "sweep", "rising": rising} for rising in (True, False) for _ in range(5)]
    rng.shuffle(wanted)
    prompts = []
    for index in range(count):
        fields = dict(wanted[index % len(wanted)])
        if fields["kind"] == "arpeggio":
            fields |= {"note": rng.randint(48, 59), "scale": rng.choice(("minor", "major"))}
        clip = sounds.Clip(seconds=round(rng.uniform(1, 5.5), 2), **fields)
        letter_case = rng.choice((str, str.lower, str.upper, str.capitalize))
        prompts.append((letter_case(sounds.caption(clip, rng)), clip))
    return prompts


@contextmanager
def raw_seconds(folder: Path) -> Iterator[Path]:
    """A model folder like `folder` with the seconds formula that other ports use: seconds unscaled, [cos, sin, x]."""
    from mlx_audio_native.config import read_config_json

    config = read_config_json(folder)
    for conditioner in config["model"]["conditioning"]["configs"]:
        if conditioner["type"] == "number":
            conditioner["config"] |= {"features": ["cos", "sin", "x"], "scale": 1.0}
    with tempfile.TemporaryDirectory() as altered:
        for entry in folder.resolve().iterdir():
            if entry.name not in ("config.json", "model_config.json"):
                (Path(altered) / entry.name).symlink_to(entry)
        (Path(altered) / "config.json").write_text(json.dumps(config))
        yield Path(altered)


def render(folder: Path, wanted: Sequence[tuple[str, Any]], seed: int) -> Iterator[np.ndarray]:
    """Uncropped audio (frames, channels) of prompts and clips, with the model's defaults and seeds from `seed` on."""
    import mlx.core as mx
    from tqdm import tqdm

    from mlx_audio_native import load
    from mlx_audio_native.errors import InputError

    model, together = load(folder), 4
    if model.config.sample_rate != SAMPLE_RATE:
        raise InputError(f"the sound checks hear {SAMPLE_RATE} Hz, this model makes {model.config.sample_rate} Hz")
    for start in tqdm(range(0, len(wanted), together), unit=f"{together} clips", disable=None):
        prompts, clips = zip(*wanted[start : start + together], strict=True)
        seconds, seeds = [clip.seconds for clip in clips], [seed + start + i for i in range(len(clips))]
        for state in model.sample(prompts, seconds=seconds, seed=seeds):
            mx.eval(state.latents)
        yield from np.array(model.autoencoder.decode(state.latents).astype(mx.float32))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="default: the embedded demo model")
    parser.add_argument("--count", type=int, default=175, help="clips, default 175: each held-out combination once")
    parser.add_argument("--seed", type=int, default=0, help="draws the prompts; the first clip's seed")
    parser.add_argument(
        "--seconds-formula",
        choices=("reference", "raw"),
        default="reference",
        help="raw: feed the seconds as other ports do, unscaled and as [cos, sin, x]",
    )
    parser.add_argument("--failures", action="store_true", help="also print each prompt that fails a check")


def run(args: argparse.Namespace) -> int:
    """0 if every bound is met, else 1."""
    from mlx_audio_native.model import DEMO

    folder = args.model or DEMO
    wanted, heard = held_out(args.count, args.seed), []
    with raw_seconds(folder) if args.seconds_formula == "raw" else nullcontext(folder) as folder:
        for (prompt, clip), audio in zip(wanted, render(folder, wanted, args.seed), strict=True):
            heard.append(listen(audio, clip))
            failed = [f"{check}: {result.what}" for check, result in heard[-1].items() if not result.passed]
            if failed and args.failures:
                print(f"{prompt!r}, {clip.seconds:.2f} s: {'; '.join(failed)}")
    rows = table(heard)
    print(format_table(rows))
    return 0 if all(row.ok for row in rows) else 1
