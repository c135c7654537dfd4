"""Load a model folder; turn prompts into audio."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from . import __version__, cuda, hub
from .audio import Audio, Recipe
from .config import PARTS
from .dit import Prepared
from .editing import edit
from .errors import InputError, MlxAudioError
from .init_audio import Source, read_source
from .request import Clip, Request, check_request, window_frames
from .sampling import SAMPLERS, State, Velocity, clip_noise, guided, sample_noise
from .tensorfile import sha256
from .weights import WEIGHTS, load_parts
from .windows import close_loop, render_long

DEMO = Path(__file__).parent / "demo"
log = logging.getLogger(__name__)
_kept = 2**32  # bytes, growing; to take a decoder's memory from CUDA's driver anew costs half as long as to decode


class Model:
    """A loaded model: `config`, and `tokenizer`, `conditioner`, `dit` and `autoencoder`, None where not asked for."""

    def __init__(
        self,
        folder: Path,
        parts: Sequence[str] = PARTS,
        dtype: str | None = None,
        text_encoder: Path | None = None,
    ) -> None:
        loaded = load_parts(folder, parts, dtype, text_encoder)
        self.folder = folder
        self.config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.conditioner = loaded.conditioner
        self.dit = loaded.dit
        self.autoencoder = loaded.autoencoder

    @cached_property
    def sha256(self) -> str:
        """Of the folder's model.safetensors, in hexadecimal."""
        return sha256(self.folder / WEIGHTS)

    def compile(self) -> Model:
        """Has a GPU's work compiled from now on, and returns the model; nothing changes on a CPU.

        Clips are then made faster. But each part is compiled at its first call, which takes some seconds in every
        process and on an NVIDIA GPU half a minute the first time ever, and traced for each length of text and clip.

        On an NVIDIA GPU set MLX_USE_CUDA_GRAPHS=0 before MLX runs, as the command line does: the host, which many
        clips and short texts wait for, has less to do then.
        """
        for part in (self.conditioner, self.dit, self.autoencoder):
            if part is not None:
                part.compile()
        return self

    def generate(
        self,
        prompt: str | Sequence[str],
        seconds: float | Sequence[float] | None = None,
        steps: int | None = None,
        cfg_scale: float | None = None,
        negative_prompt: str | None = None,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        init_audio: str | os.PathLike[str] | Audio | None = None,
        noise_level: float | None = None,
        inpaint: tuple[float, float] | None = None,
        trim: bool = False,
        bars: int | None = None,
        bpm: float | None = None,
    ) -> Audio | list[Audio]:
        """Audio for one prompt; a list of them if prompt, seconds or seed is a sequence, of which any may be single.

        A single seed serves every clip, so that a clip of a batch is the clip it would be alone; without one, each
        clip's is drawn and stands in its recipe. Other defaults follow from the model's objective; `seconds` is 4, or
        the window if that is shorter. A progress bar shows on a terminal.

        Every clip starts from `init_audio`, if there is any: a file, or Audio, see `read_source`. noise_level says how
        much of it is made anew, from 0 to 1 (k-diffusion's samplers: noise levels up to 500), 0.7 by default. With
        `inpaint`, a start and an end in seconds, only what is between is, and by default all of that. `seconds` is
        then the init audio's length unless told otherwise.

        A clip longer than the window is made of windows, each going on from the one before, see `windows`. `bars` of
        four beats in place of `seconds` make a loop, at `bpm` or the prompt's own tempo.

        Raises InputError, AudioFileError for the init audio, or MlxAudioError if the result is not finite.
        """
        request = self._check(
            prompt=prompt,
            seconds=seconds,
            steps=steps,
            cfg_scale=cfg_scale,
            negative_prompt=negative_prompt,
            seed=seed,
            sampler=sampler,
            init_audio=init_audio,
            noise_level=noise_level,
            inpaint=inpaint,
            trim=trim,
            bars=bars,
            bpm=bpm,
        )
        if all(clip.made <= window_frames(self.config) for clip in request.clips):
            made = self._render(request, self._noise(request))
        else:
            made = [self._render_long(request, clip) for clip in request.clips]
        clips = []
        for samples, clip in zip(made, request.clips, strict=True):
            if clip.made > clip.frames:
                samples = close_loop(samples, clip.frames, self.config.sample_rate)
            clips.append(Audio(samples, self.config.sample_rate, self._recipe(request, clip)))
        return clips[0] if request.single else clips

    def sample(self, prompt: str | Sequence[str], **options: Any) -> Iterator[State]:
        """The generator under `generate`, for the same arguments: the window's latents (B, T, C) after each step.

        They are not evaluated; that is the caller's, with `mx.eval(state.latents)`. A clip must fit the window.
        """
        request = self._check(prompt=prompt, **options)
        window = window_frames(self.config)
        if any(clip.made > window for clip in request.clips):
            raise InputError(f"a clip must fit the window of this model, {window / self.config.sample_rate:.3f} s")
        return self._denoise(request, self.velocity(request), self._noise(request))

    def recipe(self, prompt: str, **options: Any) -> Recipe:
        """What stands in the clip that `generate` makes of the same arguments, without making it."""
        request = self._check(prompt=prompt, **options)
        return self._recipe(request, request.clips[0])

    def velocity(self, request: Request) -> Velocity:
        """What a sampler integrates: the DiT, with the conditioning of all clips and their guidance built in."""
        prepared = self._prepare(request)

        def velocity(latents: mx.array, t: float) -> mx.array:
            return self.dit.velocity(latents, mx.full((latents.shape[0],), t), prepared)

        return velocity if request.cfg_scale == 1 else guided(velocity, request.cfg_scale)

    def _check(
        self, init_audio: str | os.PathLike[str] | Audio | None = None, trim: bool = False, **arguments: Any
    ) -> Request:
        """The request, if this model can honour it. Raises InputError; warns of what the model will not hear."""
        if None in (self.conditioner, self.dit, self.autoencoder):
            raise InputError(f"making audio takes all of a model's parts: {', '.join(PARTS)}")
        if self.tokenizer is None:
            raise InputError(f"{self.folder} has no spiece.model to read text with")
        source = None
        if init_audio is not None:
            sizes = self.config.sample_rate, self.config.audio_channels, window_frames(self.config)
            source = read_source(init_audio, *sizes, trim)
        request = check_request(self.config, source=source, **arguments)
        limit = self.config.prompt.max_length
        for text in dict.fromkeys([*(clip.prompt for clip in request.clips), request.negative_prompt or ""]):
            if cut := self.tokenizer.find_cut(text, limit):
                warnings.warn(f"the prompt is longer than {limit} tokens, so this is not heard: {cut!r}", stacklevel=3)
        return request

    def _prepare(self, request: Request) -> Prepared:
        """What the DiT needs of the conditioning; under guidance for two batches, conditional and unconditional."""
        tokens, global_cond = self._encode(request, [clip.prompt for clip in request.clips])
        if request.cfg_scale != 1:
            null = mx.zeros_like(tokens)
            if request.negative_prompt is not None:
                null, _ = self._encode(request, [request.negative_prompt] * len(request.clips))
            tokens, global_cond = mx.concatenate([tokens, null]), mx.concatenate([global_cond, global_cond])
        prepared = self.dit.prepare(tokens, global_cond)
        mx.eval(prepared)
        return prepared

    def _encode(self, request: Request, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """Cross-attention tokens (B, N, D), zero where masked, and global vector (B, G)."""
        known = {"seconds_start": 0.0, "seconds_total": [clip.told for clip in request.clips]}
        numbers = {number.id: known[number.id] for number in self.config.numbers if number.id in known}
        encoded = self.conditioner.encode(*self.tokenizer.encode(prompts), **numbers)
        return encoded.cross_attention, encoded.global_cond

    def _noise(self, request: Request) -> Iterator[mx.array]:
        shape = self.config.latent_length, self.config.latent_channels
        return clip_noise([clip.seed for clip in request.clips], shape)

    def _denoise(self, request: Request, velocity: Velocity, noise: Iterator[mx.array]) -> Iterator[State]:
        if request.source is None:
            return sample_noise(velocity, noise, request.sampler, request.steps)
        return edit(self.config, self.autoencoder, request, velocity, noise)

    def _render(self, request: Request, noise: Iterator[mx.array]) -> list[np.ndarray]:
        """Samples (frames, channels) of each clip, all of which fit the window."""
        with stage("text and seconds"):
            velocity = self.velocity(request)
        with stage("sampling"):
            states = self._denoise(request, velocity, noise)
            for state in tqdm(evaluated(states), total=request.steps, disable=None, leave=False):
                latents = state.latents
            del velocity  # and the keys and values that it holds
        _require_finite(latents, "latents")
        with stage("decoding"):
            samples = self._decode(latents, max(clip.made for clip in request.clips))
        _require_finite(samples, "samples")
        return [np.array(one[: clip.made]) for one, clip in zip(samples, request.clips, strict=True)]

    def _render_long(self, request: Request, clip: Clip) -> np.ndarray:
        noise = self._noise(replace(request, clips=(clip,)))

        def render(part: Clip, source: Source | None, kept: int) -> np.ndarray:
            one = replace(request, clips=(part,))
            if source is not None:
                fill = kept / self.config.sample_rate, window_frames(self.config) / self.config.sample_rate
                one = replace(one, source=source, noise_level=SAMPLERS[request.sampler].sigma_max, inpaint=fill)
            return self._render(one, noise)[0]

        return render_long(render, self.config, clip)

    def _decode(self, latents: mx.array, frames: int) -> mx.array:
        """float32 samples (B, at least frames, channels), from no more latents than have a part in them."""
        samples = self.autoencoder.decode(latents[:, : self.config.autoencoder.latents_for(frames)])
        mx.eval(samples)
        return samples

    def _recipe(self, request: Request, clip: Clip) -> Recipe:
        return Recipe(
            prompt=clip.prompt,
            negative_prompt=request.negative_prompt,
            seconds=clip.seconds,
            seed=clip.seed,
            steps=request.steps,
            sampler=request.sampler,
            cfg_scale=request.cfg_scale,
            model=hub.name(self.folder),
            model_sha256=self.sha256,
            version=__version__,
            init_audio=request.source.name if request.source else None,
            init_audio_sha256=request.source.sha256 if request.source else None,
            noise_level=request.noise_level,
            inpaint=request.inpaint,
            bars=request.bars,
            bpm=clip.bpm,
        )


def load(folder: str | Path | None = None, parts: Sequence[str] = PARTS, dtype: str | None = None) -> Model:
    """Load a model folder, a model by its hub id, or the embedded demo model; of its parts, only those named.

    `dtype` is float32, float16 or bfloat16 for every part; None leaves each part its own default. A string that names
    nothing here and reads `OWNER/NAME` or `OWNER/NAME@REVISION` is an id, see `hub.resolve`. Raises MlxAudioError for
    a folder that is not exactly what its config says.
    """
    folder = DEMO if folder is None else hub.resolve(folder)
    return Model(folder, parts, dtype, hub.text_encoder(folder) if "conditioner" in parts else None)


def generate(prompt: str | Sequence[str], **options: Any) -> Audio | list[Audio]:
    """`Model.generate` of the embedded demo model, which is loaded once."""
    return _embedded().generate(prompt, **options)


@cache
def _embedded() -> Model:
    return load()


def evaluated(states: Iterator[State]) -> Iterator[State]:
    """The states of a sampler, each evaluated while the next is built."""
    previous = None
    for state in states:
        mx.async_eval(state.latents)
        if previous is not None:
            mx.eval(previous.latents)
            yield previous
        previous = state
    mx.eval(previous.latents)
    yield previous


def _bound_cache() -> None:
    """To twice what was in use at once, since a stage's arrays are not of another's sizes; a lower limit stays."""
    global _kept
    limit = max(_kept, 2 * mx.get_peak_memory())
    before = mx.set_cache_limit(limit)
    if before < _kept:
        mx.set_cache_limit(before)
    else:
        _kept = limit


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Logs how long a stage took, and gives back memory that it alone needed; CUDA keeps some for more clips."""
    start = time.perf_counter()
    yield
    if cuda.is_default():
        _bound_cache()
    else:
        mx.clear_cache()
    log.info("%-18s %7.3f s", name, time.perf_counter() - start)


def _require_finite(array: mx.array, what: str) -> None:
    if not mx.isfinite(array).all().item():
        raise MlxAudioError(f"the {what} came out as NaN or infinity, so there is no audio")
