"""Golden files: a reference's tensors, with what was asked of it and where they come from; holding arrays to them.

A name is `stage.what`. Under `input` stands what was fed, everything else came out. Needs neither torch nor MLX.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlx_audio_native.errors import InputError, MlxAudioError
from mlx_audio_native.schema import Section, check

FORMAT = "mlx-audio-native golden 2"
PARITY = Path(__file__).parent / "data" / "parity"
DEMO = Path(__file__).parent.parent / "mlx_audio_native" / "demo"
INPUT = "input"
# made end to end, it is the decoder's audio: both start from the same noise
CLIP, AUDIO = "clip.audio", "decoder.audio"

_AXES = {"ids": 2, "mask": 2, "cross_attention": 3, "global_cond": 2, "noise": 4, "window": 3, "latents": 3}


class GoldenError(MlxAudioError):
    """A golden file that is missing, damaged, or of another model."""


class Bound(NamedTuple):
    """The largest deviation allowed in float32; `measure` is `max abs` (over max(1, largest value)) or `rel rms`."""

    limit: float
    measure: str


BOUNDS = {
    "tokens": Bound(0, "max abs"),
    "text": Bound(5e-6, "max abs"),
    "seconds": Bound(1e-6, "max abs"),
    "conditioning": Bound(5e-6, "max abs"),
    "velocity": Bound(5e-6, "rel rms"),
    "sampling": Bound(1e-4, "rel rms"),
    "decoder": Bound(1e-5, "rel rms"),
    "encoder": Bound(1e-5, "rel rms"),
    "clip": Bound(1e-3, "rel rms"),
}
# recorded from weights in fewer bits, which another engine need not round alike
# (dynamic int8 rounds what it multiplies too: a trained model's own weights are then 6e-2 off the interpreter)
PRECISIONS = {"float16": Bound(5e-3, "rel rms"), "int8": Bound(1e-1, "rel rms")}
# compared where products round what they multiply to 11 bits, as float16 does; sampling adds the errors of its steps up
TF32_BOUND, TF32_SAMPLING_BOUND = Bound(1e-2, "rel rms"), Bound(1e-1, "rel rms")
_NO_PRODUCT, _SAMPLED = ("tokens", "seconds"), ("sampling", "clip")


def bound_of(stage: str, precision: str = "float32", tf32: bool = False) -> Bound:
    """For a stage recorded from weights of a precision, and compared with or without TF32."""
    bound = PRECISIONS.get(precision, BOUNDS[stage])
    if tf32 and stage not in _NO_PRODUCT:
        return max(bound, TF32_SAMPLING_BOUND if stage in _SAMPLED else TF32_BOUND)
    return bound


@dataclass(frozen=True)
class Run:
    """One sampling of all clips from the recorded noise."""

    name: str
    sampler: str
    steps: int
    cfg_scale: float = 1.0
    negative: bool = False


@dataclass(frozen=True)
class Request:
    """What is asked of a model. `numbers` has a value for each prompt; the first prompts, with `seconds`, are clips."""

    prompts: tuple[str, ...]
    numbers: dict[str, tuple[float, ...]]
    seconds: tuple[float, ...]
    negative_prompt: str
    times: tuple[float, ...]
    runs: tuple[Run, ...]

    @classmethod
    def read(cls, values: Any) -> Request:
        """From JSON. Raises ConfigError."""
        section = Section(values, "request")
        runs = []
        for entry in section.many("runs", dict):
            run = Section(entry, "request.runs")
            name, sampler, steps = run.take("name", str), run.take("sampler", str), run.size("steps", most=10_000)
            runs.append(Run(name, sampler, steps, run.take("cfg_scale", float), run.take("negative", bool)))
            run.done()
        values = section.take("numbers", dict)
        numbers = Section(values, "request.numbers")
        request = cls(
            prompts=section.many("prompts", str),
            numbers={id_: numbers.many(id_, float) for id_ in values},
            seconds=section.many("seconds", float),
            negative_prompt=section.take("negative_prompt", str),
            times=section.many("times", float),
            runs=tuple(runs),
        )
        section.done()
        check(len(request.times) > 1, "request.times has fewer than two times")
        return request


@dataclass(frozen=True)
class Recording:
    """A golden file's contents; float32 or int32 arrays, channels last. `stages`: of each, the weights' precision."""

    tensors: dict[str, np.ndarray]
    request: Request
    stages: dict[str, str]
    provenance: dict[str, str]

    def input(self, what: str) -> np.ndarray:
        array = self[f"{INPUT}.{what}"]
        if array.ndim != _AXES[what] or not array.size:
            raise GoldenError(f"the golden file's input {what!r} is {array.shape}, expected {_AXES[what]} axes")
        return array

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise GoldenError(f"the golden file lacks the tensor {name!r}")
        return self.tensors[name]

    def expected(self, stage: str) -> dict[str, np.ndarray]:
        """What came out of a stage, by name."""
        if stage == "clip":
            return {CLIP: self[AUDIO]}
        tensors = {name: array for name, array in self.tensors.items() if name.split(".")[0] == stage}
        if not tensors:
            raise GoldenError(f"the golden file has no tensor of the stage {stage}")
        return tensors

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        ours = {"request": json.dumps(asdict(self.request)), "stages": json.dumps(self.stages)}
        metadata = {"format": FORMAT, **self.provenance, **ours}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            new = Path(scratch) / path.name
            save_file({name: np.ascontiguousarray(self.tensors[name]) for name in sorted(self.tensors)}, new, metadata)
            os.replace(new, path)

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Raises GoldenError, or ConfigError for a request that is not one."""
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no iterator
        except OSError as error:
            raise GoldenError(f"cannot read {path}: {error.strerror or error}") from None
        except (SafetensorError, TypeError, KeyError) as error:
            raise GoldenError(f"{path} is no golden file: {error}") from None
        if metadata.pop("format", None) != FORMAT:
            raise GoldenError(f"{path} is no golden file: its header does not say {FORMAT!r}")
        try:
            request = Request.read(json.loads(metadata.pop("request")))
            stages = json.loads(metadata.pop("stages"))
        except (KeyError, ValueError, RecursionError):
            raise GoldenError(f"{path} is no golden file: its header lacks request or stages") from None
        section = Section(stages, "stages")
        stages = {stage: section.one_of(stage, ("float32", *PRECISIONS)) for stage in BOUNDS if stage in stages}
        section.done()
        if not request.runs and {"sampling", "clip"} & set(stages):
            raise GoldenError(f"{path} has a sampling, but asks for none")
        for name, array in tensors.items():
            if name.split(".")[0] not in (INPUT, *BOUNDS) or array.dtype not in (np.float32, np.int32):
                raise GoldenError(f"{path} has a tensor that no stage gives: {name!r}, {array.dtype}")
            if not np.isfinite(array).all():
                raise GoldenError(f"tensor {name!r} in {path} has values that are not finite")
        return cls(tensors, request, stages, metadata)


class Row(NamedTuple):
    """How far one tensor is from its golden. Where it could not be compared, `problem` says why."""

    name: str
    shape: tuple[int, ...]
    max_abs: float
    relative_rms: float
    cosine: float
    bound: Bound
    ok: bool
    problem: str = ""

    @property
    def stage(self) -> str:
        return self.name.split(".")[0]

    def __str__(self) -> str:
        shape = "×".join(map(str, self.shape))
        figures = f"{self.max_abs:10.1e}{self.relative_rms:10.1e}{self.cosine:14.9f}"
        bound = f"{self.bound.measure} {self.bound.limit:g}" if self.bound.limit else "equal"
        verdict = "OK" if self.ok else f"NOT OK{self.problem and ': '}{self.problem}"
        return f"{self.name:<32}{shape:<14}{figures}  {bound:<16}{verdict}"


HEADER = f"{'tensor':<32}{'shape':<14}{'max abs':>10}{'rel rms':>10}{'cosine':>14}  bound"


def hold(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], bound: Bound, problem: str = ""
) -> Iterator[Row]:
    """A row for each tensor of either side. `problem` says why some were not found."""
    nan = float("nan")
    for name in [*expected, *(name for name in found if name not in expected)]:
        shape = (expected if name in expected else found)[name].shape
        if name not in expected or name not in found:
            why = "no golden for it" if name in found else problem or "was not made"
            yield Row(name, shape, nan, nan, nan, bound, False, why)
        elif found[name].shape != shape:
            yield Row(name, shape, nan, nan, nan, bound, False, f"found {found[name].shape}")
        else:
            yield _measure(name, found[name].astype(np.float64), expected[name].astype(np.float64), bound)


def _measure(name: str, found: np.ndarray, expected: np.ndarray, bound: Bound) -> Row:
    largest = np.abs(found - expected).max()
    size, other = np.linalg.norm(expected), np.linalg.norm(found)
    relative = np.linalg.norm(found - expected) / size if size else float(other > 0)
    cosine = float((found * expected).sum() / (size * other)) if size and other else float(size == other)
    deviation = relative if bound.measure == "rel rms" else largest / max(1.0, np.abs(expected).max())
    # a NaN is not within any bound
    return Row(name, expected.shape, float(largest), float(relative), cosine, bound, bool(deviation <= bound.limit))


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
