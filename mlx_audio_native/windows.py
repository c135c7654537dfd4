"""Sound beyond one window of the model: long clips joined from windows, and loops joined to their own start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .config import ModelConfig
from .errors import InputError
from .init_audio import Source
from .request import Clip, tempo_of, window_frames

# A window goes on from at least this share of the one before it.
_OVERLAP = 0.25
# Latents at a window's end that are left out: they may fade out, and at a cut the encoder hears what is not there.
_MARGIN = 4
_LOOP_BLEND = 0.01  # seconds

Render = Callable[[Clip, Source | None, int], np.ndarray]
"""(what one window shall hold, what it starts with or nothing, frames of that to keep) → samples (frames, channels)"""


def window_starts(config: ModelConfig, frames: int, bpm: float | None) -> list[int]:
    """First frames of the windows that a clip of so many is made of; whole beats apart if there is a tempo.

    Raises InputError if the window is too short to go on from.
    """
    window = window_frames(config)
    if config.latent_length < 4 * _MARGIN:
        raise InputError(f"a clip must fit the window of this model, {window / config.sample_rate:.3f} s")
    hop = window - max(round(_OVERLAP * window), 2 * _MARGIN * config.downsampling_ratio)
    if bpm is not None:
        beat = 60 / bpm * config.sample_rate
        hop = int(hop / beat) * beat or hop
    starts = [0]
    while starts[-1] + window < frames:
        starts.append(round(len(starts) * hop))
    return starts


def render_long(render: Render, config: ModelConfig, clip: Clip) -> np.ndarray:
    """Samples of a clip longer than the window: each window but the first is inpainted behind its start.

    It starts with what the one before ends with. In the last latent frame that it keeps of that, the two are blended.
    """
    rate, ratio, window = config.sample_rate, config.downsampling_ratio, window_frames(config)
    made = np.zeros((0, config.audio_channels), np.float32)
    for start in window_starts(config, clip.made, tempo_of(clip.prompt)):
        frames = min(window, clip.made - start)
        part = replace(clip, told=frames / rate, made=frames)
        context = made[start:]
        if not len(context):
            made = render(part, None, 0)
            continue
        kept = (len(context) // ratio - _MARGIN) * ratio
        samples = render(part, Source(context), kept)
        joint = slice(kept - ratio, kept)
        made = np.concatenate([made[: start + joint.start], blend(context[joint], samples[joint]), samples[kept:]])
    return made


def close_loop(samples: np.ndarray, frames: int, sample_rate: int) -> np.ndarray:
    """A loop's `frames` of samples that go on a little: what follows its end leads over into its start.

    So the step across the seam is one between neighbours, as inside. Shorter than the samples by their tail.
    """
    length = min(round(_LOOP_BLEND * sample_rate) or 1, frames, len(samples) - frames)
    return np.concatenate([blend(samples[frames : frames + length], samples[:length]), samples[length:frames]])


def blend(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """From one (frames, channels) to the other, beginning with the first."""
    weight = (np.arange(len(first), dtype=np.float32) / len(first))[:, None]
    return first + weight * (second - first)
