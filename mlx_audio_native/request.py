"""What is asked of a model: checked, and with every default filled in."""

from __future__ import annotations

import math
import operator
import re
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .config import ModelConfig
from .errors import InputError
from .init_audio import NOISE_LEVEL, Source
from .sampling import DEFAULTS, SAMPLERS, find_sampler

DEFAULT_SECONDS = 4.0
MAX_SECONDS = 3600
BEATS = 4  # of a bar
SLOWEST, FASTEST = 1, 1000  # tempos
# What is made beyond a loop's end, so that its sound does not end there: long enough to blend, and for a fade-out.
LOOP_TAIL = 0.1
_TEMPO = re.compile(r"(\d+(?:\.\d+)?)\s*bpm\b", re.IGNORECASE)
MAX_STEPS = 10_000
MAX_SEED = 2**64 - 1  # what a key of mx.random takes


@dataclass(frozen=True)
class Clip:
    """One clip. The model is told `told` seconds, and `made` frames are made: a loop's go beyond its own, to blend its
    start with. Only a loop has a tempo, `bpm`.
    """

    prompt: str
    seconds: float
    frames: int
    seed: int
    told: float
    made: int
    bpm: float | None = None


@dataclass(frozen=True)
class Request:
    """Clips to be made in one batch, and what is common to them. `single`: one clip is wanted, not a list of one.

    Of a `source`, `noise_level` tells how much is replaced, and `inpaint` the seconds between which.
    """

    clips: tuple[Clip, ...]
    steps: int
    sampler: str
    cfg_scale: float
    negative_prompt: str | None
    single: bool
    source: Source | None = None
    noise_level: float | None = None
    inpaint: tuple[float, float] | None = None
    bars: int | None = None


def check_request(
    config: ModelConfig,
    prompt: str | Sequence[str],
    seconds: float | Sequence[float] | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
    negative_prompt: str | None = None,
    seed: int | Sequence[int] | None = None,
    sampler: str | None = None,
    source: Source | None = None,
    noise_level: float | None = None,
    inpaint: Sequence[float] | None = None,
    bars: int | None = None,
    bpm: float | None = None,
) -> Request:
    """Arguments as in `Model.generate`. Raises InputError, which names the argument and its limit."""
    defaults = DEFAULTS[config.objective]
    sampler = defaults.sampler if sampler is None else sampler
    find_sampler(sampler, config.objective)
    if sampler == "rk4" and config.dit.shifts_distribution:
        raise InputError("rk4 cannot sample this model: its config shifts rk4's times (distribution_shift_options)")
    steps = defaults.steps if steps is None else _whole("steps", steps, 1, MAX_STEPS)
    cfg_scale = defaults.cfg_scale if cfg_scale is None else _number("cfg_scale", cfg_scale)
    if negative_prompt is not None:
        _require_text("negative prompt", negative_prompt)
        if cfg_scale == 1:
            raise InputError("a negative prompt does nothing at cfg_scale 1: give another cfg_scale, or no such prompt")
    if cfg_scale != 1 and config.objective == "rf_denoiser":
        warnings.warn(
            f"cfg_scale {cfg_scale:g}: this model is made to run at 1, and anything else adds artefacts", stacklevel=4
        )
    noise_level, inpaint = _edit(config, source, noise_level, inpaint, sampler)
    if bars is not None and seconds is not None:
        raise InputError("a loop is as long as its bars: give bars or seconds, not both")
    if bars is None and bpm is not None:
        raise InputError("bpm is about a loop: give bars too")
    bars = None if bars is None else _whole("bars", bars, 1, 10_000)
    if seconds is None and source is not None:
        seconds = max(len(source.samples) / config.sample_rate, inpaint[1] if inpaint else 0.0)
    clips = []
    for one_prompt, one_length, one_seed in _spread(prompts=prompt, lengths=seconds, seeds=seed):
        _require_text("prompt", one_prompt)
        tempo, tail = None, 0.0
        if bars is not None:
            one_prompt, tempo = _tempo(one_prompt, bpm)
            one_length, tail = bars * BEATS * 60 / tempo, LOOP_TAIL
        length, frames = _length(one_length, config)
        told, made = length + tail, frames + math.ceil(tail * config.sample_rate)
        if source is not None and made > window_frames(config):
            limit = _window_seconds(config)
            raise InputError(f"with init audio a clip fits the window of this model, {limit:g} s, not {length:g}")
        if inpaint is not None and inpaint[0] >= length:
            raise InputError(f"inpaint starts at {inpaint[0]:g} s, but the clip ends at {length:g}")
        seed_ = secrets.randbelow(2**32) if one_seed is None else _whole("seed", one_seed, 0, MAX_SEED)
        clips.append(Clip(one_prompt, length, frames, seed_, told, made, tempo))
    single = not any(_is_many(value) for value in (prompt, seconds, seed))
    edit = source, noise_level, inpaint, bars
    return Request(tuple(clips), steps, sampler, cfg_scale, negative_prompt, single, *edit)


def _edit(
    config: ModelConfig, source: Source | None, noise_level: float | None, inpaint: Sequence[float] | None, sampler: str
) -> tuple[float | None, tuple[float, float] | None]:
    """The noise level and the stretch to fill in, if any."""
    if source is None:
        for name, value in (("noise_level", noise_level), ("inpaint", inpaint)):
            if value is not None:
                raise InputError(f"{name} is about init audio, and there is none")
        return None, None
    sigma_max = SAMPLERS[sampler].sigma_max
    if noise_level is None:
        level = NOISE_LEVEL if inpaint is None else sigma_max
    else:
        level = _number("noise_level", noise_level)
    if not 0 <= level <= sigma_max:
        raise InputError(f"noise_level must be from 0 to {sigma_max:g} with {sampler}, not {level:g}")
    if inpaint is None:
        return level, None
    if not _is_many(inpaint) or len(inpaint) != 2:
        raise InputError(f"inpaint must be a start and an end in seconds, not {inpaint!r:.60}")
    start, end = (_number("inpaint", value) for value in inpaint)
    if not 0 <= start < end <= window_frames(config) / config.sample_rate:
        limit = _window_seconds(config)
        raise InputError(f"inpaint runs from a second to a later one, within 0 and {limit:g}, not {start:g} to {end:g}")
    return level, (start, end)


def tempo_of(prompt: str) -> float | None:
    """Beats a minute that a prompt names, as in `house beat, 124 BPM`; None if it names none that can be."""
    found = _TEMPO.search(prompt)
    return float(found[1]) if found and SLOWEST <= float(found[1]) <= FASTEST else None


def _tempo(prompt: str, bpm: float | None) -> tuple[str, float]:
    """A loop's prompt and tempo, each of which may come from the other."""
    named = tempo_of(prompt)
    bpm = named if bpm is None else _number("bpm", bpm)
    if bpm is None:
        raise InputError("a loop takes a tempo: give bpm, or name it in the prompt, as in 'kick drum loop, 120 BPM'")
    if not SLOWEST <= bpm <= FASTEST:
        raise InputError(f"bpm must be from {SLOWEST} to {FASTEST}, not {bpm:g}")
    if named is None:
        return f"{prompt}, {repr(bpm).removesuffix('.0')} BPM", bpm  # every digit: the recipe's prompt is read again
    if named != bpm:
        raise InputError(f"the prompt names {named:g} BPM, and bpm is {bpm:g}")
    return prompt, bpm


def window_frames(config: ModelConfig) -> int:
    """Audio frames of the model's window."""
    return config.autoencoder.decoded_frames(config.latent_length)


def _window_seconds(config: ModelConfig) -> float:
    return math.floor(window_frames(config) / config.sample_rate * 1000) / 1000


def _spread(**arguments: Any) -> Sequence[tuple[Any, ...]]:
    """Arguments clip by clip: those that are no sequences serve every clip."""
    counts = {name: len(value) for name, value in arguments.items() if _is_many(value)}
    count = max(counts.values(), default=1)
    if count == 0 or set(counts.values()) - {count}:
        found = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise InputError(f"a batch needs as many of each as it has clips, found {found}")
    return list(zip(*(value if _is_many(value) else [value] * count for value in arguments.values()), strict=True))


def _is_many(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _require_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"the {name} must be text, not {text!r:.60}")
    if not text.strip():
        raise InputError(f"the {name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the {name} is not valid Unicode text") from None


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, not {value!r:.60}") from None
    if not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, not {number}")
    return number


def _whole(name: str, value: Any, least: int, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, not {value!r:.60}") from None
    if not least <= number <= most:
        raise InputError(f"{name} must be from {least} to {most}, not {number}")
    return number


def _length(seconds: Any, config: ModelConfig) -> tuple[float, int]:
    """Seconds, and the frames they come to."""
    rate = config.sample_rate
    length = min(DEFAULT_SECONDS, window_frames(config) / rate) if seconds is None else _number("seconds", seconds)
    if length > MAX_SECONDS:
        raise InputError(f"seconds must be at most {MAX_SECONDS}, not {length:g}")
    frames = round(length * rate)
    if frames < 1:
        raise InputError(f"seconds must be above 0, long enough for one frame, not {length:g}")
    return length, frames
