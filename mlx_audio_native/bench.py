"""How long each stage of making a clip takes, and how much memory, on this machine."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from . import __version__
from .blas import prefer_openblas
from .config import PARTS, ModelConfig
from .errors import InputError
from .model import DEMO, Model, evaluated, load, stage
from .names import entries
from .releases import release_config
from .request import check_request, window_frames
from .sampling import clip_noise, sample_noise
from .tensorfile import Stored
from .weights import build, fill, read_tokenizer

PROMPT = "kick drum loop, 120 BPM"
TOKENIZER = DEMO / "spiece.model"  # a vocabulary of any size does, as long as T5's table is larger
# in the table's order; text and seconds are measured alone, conditioning is both and the DiT's keys and values
STAGES = ("text and seconds", "seconds alone", "conditioning", "a step", "sampling", "decoding", "to NumPy", "clip")


class RandomModel(Model):
    """A config's sizes with random weights, the same at every start; nothing is read but a tokenizer."""

    def __init__(self, name: str, config: dict[str, Any], dtype: str | None = None) -> None:
        self.folder = Path(name)
        self.config = ModelConfig.from_dict(config)
        modules = build(self.config, {})
        fill(modules, random_tensors(modules), dtype)
        self.conditioner, self.dit, self.autoencoder = (modules[part] for part in PARTS)
        self.tokenizer = read_tokenizer(TOKENIZER, self.config)
        self.sha256 = "random weights"


def random_tensors(modules: dict[str, Any]) -> dict[str, Stored]:
    """A tensor for each that the modules' folder would hold, float32: dense ones uniform within 1/√inputs.

    That keeps every layer's output about as large as its input, so that float16 does not overflow. Gains are one,
    biases zero.
    """
    found = [entry for module in modules.values() for entry in entries(module)]

    def draw(index: int) -> mx.array:
        entry = found[index]
        if len(entry.shape) > 1 or entry.exact:
            bound = prod(entry.shape[1:]) ** -0.5
            return mx.random.uniform(-bound, bound, entry.shape, key=mx.random.key(index))
        is_gain = entry.target.endswith("norm.weight")
        return mx.full(entry.shape, float(is_gain))

    return {
        entry.source: Stored(entry.source, Path("random weights"), "F32", entry.shape, partial(draw, index))
        for index, entry in enumerate(found)
    }


@dataclass
class Times:
    """Seconds and peak bytes of each stage, a value a run; the first run is the cold one."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        mx.reset_peak_memory()
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)
        self.peak[name] = max(self.peak[name], mx.get_peak_memory())

    def rows(self) -> dict[str, dict[str, float]]:
        """Seconds and bytes of each stage: `first`, and `median` and `minimum` of the runs after it."""
        rows = {}
        for name in STAGES:
            first, *warm = self.seconds[name]
            rows[name] = {"first": first, "median": median(warm), "minimum": min(warm), "peak_bytes": self.peak[name]}
        return rows


class Bench:
    """A model and what is asked of it, to be run again and again."""

    def __init__(self, model: Model, seconds: float | None = None, steps: int | None = None, batch: int = 1) -> None:
        if batch < 1:
            raise InputError(f"the batch must be at least 1, not {batch}")
        self.model, self.times = model, Times()
        length = window_frames(model.config) / model.config.sample_rate if seconds is None else seconds
        self.options = {"prompt": [PROMPT] * batch, "seconds": length, "steps": steps, "seed": list(range(batch))}
        self.request = check_request(model.config, **self.options)
        if self.request.clips[0].frames > window_frames(model.config):
            raise InputError(f"only clips within the model's window are measured, not {length:g} s")

    @property
    def latents(self) -> int:
        """How many latent frames are decoded."""
        needed = self.model.autoencoder.config.latents_for(self.request.clips[0].frames)
        return min(needed, self.model.config.latent_length)

    def run(self) -> None:
        """Once stage by stage, as `Model.generate` goes about it, and once by `Model.generate`.

        The first time, the stages alone, while nothing is compiled or cached: their sum is then the clip's.
        """
        model, request, measure = self.model, self.request, self.times.measure
        shape = model.config.latent_length, model.config.latent_channels
        noise = clip_noise([clip.seed for clip in request.clips], shape)
        is_first, start = "clip" not in self.times.seconds, time.perf_counter()
        with measure("conditioning"), stage("text and seconds"):
            velocity = model.velocity(request)
        with measure("sampling"), stage("sampling"):
            *_, state = evaluated(sample_noise(velocity, noise, request.sampler, request.steps))
        del velocity
        with measure("decoding"), stage("decoding"):
            samples = model.autoencoder.decode(state.latents[:, : self.latents])
            mx.eval(samples)
        with measure("to NumPy"):
            np.array(samples)
        self.times.seconds["a step"].append(self.times.seconds["sampling"][-1] / request.steps)
        self.times.peak["a step"] = self.times.peak["sampling"]
        if is_first:
            self.times.seconds["clip"].append(time.perf_counter() - start)
        else:
            del samples, state
            with measure("clip"):
                model.generate(**self.options)
        self._condition()

    def warm_up(self) -> None:
        """A run whose times are not counted."""
        self.run()
        for seconds in self.times.seconds.values():
            seconds.pop()

    def _condition(self) -> None:
        conditioner, request = self.model.conditioner, self.request
        known = {"seconds_start": 0.0, "seconds_total": [clip.seconds for clip in request.clips]}
        with self.times.measure("text and seconds"):
            ids, mask = self.model.tokenizer.encode([clip.prompt for clip in request.clips])
            encoded = conditioner.encode(ids, mask, **{id_: known[id_] for id_ in conditioner.numbers})
            mx.eval(encoded.cross_attention, encoded.global_cond)  # what the DiT listens to; the mask is for others
        with self.times.measure("seconds alone"):
            mx.eval([embed(np.reshape(known[id_], -1)) for id_, embed in conditioner.numbers.items()])

    def asked(self) -> dict[str, Any]:
        """What is measured, as JSON."""
        request = self.request
        return {
            "model": self.model.folder.name,
            "dtype": str(self.model.autoencoder.dtype).removeprefix("mlx.core."),
            "batch": len(request.clips),
            "seconds": request.clips[0].seconds,
            "steps": request.steps,
            "sampler": request.sampler,
            "cfg_scale": request.cfg_scale,
        }

    def report(self, load_seconds: float) -> dict[str, Any]:
        """All there is to tell, as JSON."""
        asked, rows = self.asked(), self.times.rows()
        return {
            "machine": machine(),
            **asked,
            "runs": len(self.times.seconds["clip"]) - 1,
            "load_seconds": load_seconds,
            "stages": rows,
            "realtime": asked["batch"] * asked["seconds"] / rows["clip"]["median"],
            "primitives": self.primitives(),
        }

    def primitives(self) -> dict[str, int]:
        """How many operations a GPU is given for one velocity and for decoding, one chunk of it; views count, too.

        Nothing is counted on a CPU: MLX has other operations there, and some of the work is done beside its graph.
        """
        if mx.default_device() == mx.cpu:
            return {}
        model = self.model
        shape = len(self.request.clips), model.config.latent_length, model.config.latent_channels
        latents, velocity = mx.zeros(shape), model.velocity(self.request)
        mx.eval(latents)
        decoded = model.autoencoder.decode_whole(latents[:, : min(self.latents, model.autoencoder.config.at_once)])
        return {"a step": count_primitives(velocity(latents, 0.5)), "decoding": count_primitives(decoded)}


def count_primitives(output: mx.array) -> int:
    """Of the graph that is still to be evaluated."""
    dot = io.StringIO()
    mx.export_to_dot(dot, output)
    return len(re.findall(r"\[label =", dot.getvalue()))


def machine() -> dict[str, str]:
    """What was measured on."""
    on_gpu = mx.default_device() == mx.gpu
    tf32 = "allowed" if on_gpu and os.environ.get("MLX_ENABLE_TF32", "1") != "0" else "off"
    device = f"{mx.device_info().get('device_name', 'unknown')} ({'GPU' if on_gpu else f'{os.cpu_count()} CPU cores'})"
    blas = {} if on_gpu or sys.platform != "linux" else {"BLAS": "OpenBLAS" if prefer_openblas() else "MLX's own"}
    versions = {"mlx-audio-native": __version__, "MLX": mx.__version__, "Python": platform.python_version()}
    return {"device": device, **blas, "TF32": tf32, **versions, "platform": platform.platform()}


def run(
    folder: str | None, random: str | None, dtype: str | None, runs: int, compile: bool = False, **options: Any
) -> dict[str, Any]:
    """Load a model folder, or make a random one of a published model's sizes; run it cold, then `runs` times warm.

    `options` are a Bench's. Returns its report. Raises MlxAudioError.
    """
    if runs < 1:
        raise InputError(f"runs must be at least 1, not {runs}")
    start = time.perf_counter()
    model = RandomModel(random, release_config(random), dtype) if random else load(folder, dtype=dtype)
    if compile:
        model.compile()
    load_seconds = time.perf_counter() - start
    bench = Bench(model, **options)
    for _ in range(1 + runs):
        bench.run()
    return bench.report(load_seconds)


def table(report: dict[str, Any]) -> Iterator[str]:
    """A report as lines of Markdown."""
    yield from (f"- {key}: {value}" for key, value in report["machine"].items())
    clips = "1 clip" if report["batch"] == 1 else f"{report['batch']} clips at once, each"
    guidance = f", cfg scale {report['cfg_scale']:g}" if report["cfg_scale"] != 1 else ""
    yield (
        f"- {report['model']}, {report['dtype']}: {clips} of {report['seconds']:.2f} s, "
        f"{report['steps']} steps of {report['sampler']}{guidance}"
    )
    yield f"- loaded in {report['load_seconds']:.2f} s; one cold run, {report['runs']} warm ones"
    yield ""
    yield "| milliseconds | first | median | minimum | peak MB |"
    yield "|---|---:|---:|---:|---:|"
    for name, row in report["stages"].items():
        times = " | ".join(f"{row[key] * 1e3:.2f}" for key in ("first", "median", "minimum"))
        yield f"| {name} | {times} | {row['peak_bytes'] / 1e6:.0f} |"
    yield ""
    yield f"{report['realtime']:.3g} × realtime"
    for name, count in report["primitives"].items():
        yield f"{count} MLX primitives: {name}"


def write_json(report: dict[str, Any], path: Path) -> None:
    """Raises InputError."""
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
