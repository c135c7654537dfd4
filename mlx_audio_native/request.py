"""What is asked of a model: checked, and with every default filled in."""

from __future__ import annotations

import math
import operator
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .config import ModelConfig
from .errors import InputError
from .sampling import DEFAULTS, find_sampler

DEFAULT_SECONDS = 4.0
MAX_STEPS = 10_000
MAX_SEED = 2**64 - 1  # what a key of mx.random takes


@dataclass(frozen=True)
class Clip:
    prompt: str
    seconds: float
    frames: int
    seed: int


@dataclass(frozen=True)
class Request:
    """Clips to be made in one batch, and what is common to them. `single`: one clip is wanted, not a list of one."""

    clips: tuple[Clip, ...]
    steps: int
    sampler: str
    cfg_scale: float
    negative_prompt: str | None
    single: bool


def check_request(
    config: ModelConfig,
    prompt: str | Sequence[str],
    seconds: float | Sequence[float] | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
    negative_prompt: str | None = None,
    seed: int | Sequence[int] | None = None,
    sampler: str | None = None,
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
    clips = []
    for one_prompt, one_length, one_seed in _spread(prompts=prompt, lengths=seconds, seeds=seed):
        _require_text("prompt", one_prompt)
        length, frames = _length(one_length, config)
        seed_ = secrets.randbelow(2**32) if one_seed is None else _whole("seed", one_seed, 0, MAX_SEED)
        clips.append(Clip(one_prompt, length, frames, seed_))
    single = not any(_is_many(value) for value in (prompt, seconds, seed))
    return Request(tuple(clips), steps, sampler, cfg_scale, negative_prompt, single)


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
    rate, window = config.sample_rate, config.autoencoder.decoded_frames(config.latent_length)
    length = min(DEFAULT_SECONDS, window / rate) if seconds is None else _number("seconds", seconds)
    if length * rate >= window + 0.5:
        limit = math.floor(window / rate * 1000) / 1000
        raise InputError(f"seconds must be at most {limit:g}, the window of this model, not {length:g}")
    frames = round(length * rate)
    if frames < 1:
        raise InputError(f"seconds must be above 0, long enough for one frame, not {length:g}")
    return length, frames
