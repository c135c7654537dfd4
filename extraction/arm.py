"""A folder with the three .tflite files of Arm's recipe → config and weights of a whole model.

Which file holds which part follows from its graph, not from its name. Every part is held against its own graph before
anything is returned.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlx_audio_native.config import ModelConfig
from mlx_audio_native.errors import MlxAudioError
from mlx_audio_native.weights import save

from . import arm_check, check, conditioners, dit, oobleck
from .errors import ExtractionError
from .extract import Tensors, config_of
from .graph import Wiring
from .report import Report, report
from .schema import FLOATS
from .schema import read as read_graph

# what no graph holds: the release's own
SAMPLE_RATE = 44100
OBJECTIVE = "rf_denoiser"
_KINDS = ("conditioners", "DiT", "autoencoder")
_MOST_FILES = 16


@dataclass(frozen=True)
class ArmReport:
    """What was recovered from each file, and what holds for the whole model."""

    files: tuple[Report, ...]
    notes: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        return [f"{Path(file.file).name}: {text}" for file in self.files for text in file.warnings]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [line for file in self.files for line in file.lines()]
        return lines + [f"note: {text}" for text in self.notes]


@dataclass(frozen=True)
class _Part:
    """What one file gives: its sections of the config, its tensors, and what to compare."""

    found: Any
    model: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read(folder: Path | str) -> tuple[dict[str, Any], dict[str, np.ndarray], ArmReport]:
    """Config (stable-audio-tools' schema), tensors (by their names in a model folder) and a report.

    Raises ExtractionError where a file is missing, damaged, or not what the runtime can express.
    """
    folder = Path(folder)
    wirings = _find(folder)
    parts = {kind: _guarded(wiring, _RECOVER[kind], wiring) for kind, wiring in wirings.items()}
    config = _config(folder, parts)
    tensors: dict[str, np.ndarray] = {}
    for kind, part in parts.items():
        tensors |= _guarded(wirings[kind], dict, part.tensors)
    try:
        checked = ModelConfig.from_dict(config)
    except MlxAudioError as error:
        raise ExtractionError(f"{folder}: what was recovered is no model that the runtime takes: {error}") from error
    compared = {
        "conditioners": lambda: (_compare_conditioners(parts["conditioners"]), ""),
        "DiT": lambda: ({"velocity": arm_check.compare_dit(parts["DiT"].found, checked, tensors)}, ""),
        "autoencoder": lambda: _compare_decoder(parts["autoencoder"], checked, tensors),
    }
    reports = [_report(wirings[kind], parts[kind], *_guarded(wirings[kind], compared[kind])) for kind in _KINDS]
    notes = (f"no graph tells sample rate and objective: taken as the release's, {SAMPLE_RATE} Hz and {OBJECTIVE}",)
    return config, tensors, ArmReport(tuple(reports), notes)


def _find(folder: Path) -> dict[str, Wiring]:
    """The graph of each kind."""
    paths = sorted(folder.glob("*.tflite")) if folder.is_dir() else []
    if not paths or len(paths) > _MOST_FILES:
        raise ExtractionError(
            f"{folder} holds {len(paths)} .tflite files; conditioners, DiT and autoencoder are needed"
        )
    found: dict[str, Wiring] = {}
    for path in paths:
        wiring = _guarded(path, lambda path: Wiring(read_graph(path)), path)
        kind = _kind(wiring)
        if kind in found:
            raise ExtractionError(
                f"{found[kind].graph.path.name} and {path.name} in {folder} are both a model's {kind}"
            )
        _guarded(path, wiring.refuse_unsupported)
        found[kind] = wiring
    missing = [kind for kind in _KINDS if kind not in found]
    if missing:
        raise ExtractionError(f"{folder} has no .tflite file with a model's {' and no '.join(missing)}")
    return {kind: found[kind] for kind in _KINDS}


def _kind(wiring: Wiring) -> str:
    """Conditioners look tokens up, a decoder has transposed convolutions, a DiT has softmaxes and neither."""
    names = {operator.name for operator in wiring.graph.operators}
    if wiring.lookups():
        return "conditioners"
    return "autoencoder" if "TRANSPOSE_CONV" in names or "SOFTMAX" not in names else "DiT"


def _guarded(subject: Wiring | Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; its errors begin with the file's path."""
    path = subject.graph.path if isinstance(subject, Wiring) else subject
    try:
        # what a damaged graph makes of numbers is compared, not warned of
        with np.errstate(all="ignore"):
            return function(*arguments)
    except ExtractionError as error:
        # the reader's own errors name the file
        raise (error if str(path) in error.problem else error.about(path)) from error


def _recover_conditioners(wiring: Wiring) -> _Part:
    found = conditioners.recover(wiring)
    return _Part(found, config_of(found)["model"], Tensors(found))


def _recover_dit(wiring: Wiring) -> _Part:
    found = dit.recover(wiring)
    warnings = ()
    if found.vector is None:
        warnings = ("this export has lost its global conditioning: the DiT hears the time alone (global_cond_dim 0)",)
    model = {"diffusion": {"type": "dit", "diffusion_objective": OBJECTIVE, "config": found.config}}
    return _Part(found, model, _named("model.model.", found.weights), (*found.notes, _others(found)), warnings)


def _recover_autoencoder(wiring: Wiring) -> _Part:
    found = oobleck.recover(wiring)
    config = {
        "decoder": {"type": "oobleck", "config": found.config},
        "latent_dim": found.config["latent_dim"],
        "downsampling_ratio": prod(found.config["strides"]),
        "io_channels": found.config["out_channels"],
    }
    pretransform = {"type": "autoencoder", "config": config, "scale": found.scale}
    notes = ("the file holds the decoder alone: this model cannot encode audio",)
    return _Part(
        found, {"pretransform": pretransform}, _named("pretransform.model.decoder.layers.", found.weights), notes
    )


_RECOVER = {"conditioners": _recover_conditioners, "DiT": _recover_dit, "autoencoder": _recover_autoencoder}


def _named(prefix: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise ExtractionError(f"the weights for {prefix}{name} are not all finite")
    return {prefix + name: array for name, array in weights.items()}


def _config(folder: Path, parts: Mapping[str, _Part]) -> dict[str, Any]:
    text, net, coder = (parts[kind].model for kind in _KINDS)
    pretransform, diffusion = coder["pretransform"], {**text["diffusion"], **net["diffusion"]}
    frames = parts["DiT"].found.frames
    return {
        "model_type": "diffusion_cond",
        "sample_size": frames * pretransform["config"]["downsampling_ratio"],
        "sample_rate": SAMPLE_RATE,
        "audio_channels": pretransform["config"]["io_channels"],
        "model": {
            "pretransform": pretransform,
            "conditioning": text["conditioning"],
            "diffusion": diffusion,
            "io_channels": diffusion["config"]["io_channels"],
        },
    }


def _compare_conditioners(part: _Part) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "conditioners"
        save(folder, config_of(part.found), part.tensors)
        return check.compare(part.found, folder)


def _compare_decoder(part: _Part, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> tuple[dict, str]:
    difference, note = arm_check.compare_decoder(part.found, config, tensors)
    return {"decoder": difference}, note


def _report(wiring: Wiring, part: _Part, differences: dict[str, float], note: str) -> Report:
    known = part.found if isinstance(part.found, conditioners.Conditioners) else None
    base = report(wiring, known, check=differences)
    notes = [*base.notes, *part.notes, *([note] if note else []), *_unreached(wiring)]
    return replace(base, notes=notes, warnings=[*base.warnings, *part.warnings])


def _unreached(wiring: Wiring) -> list[str]:
    """A note on every constant that no output is made of."""
    reached = wiring.constants(wiring.graph.outputs)
    return [
        f"constant {tensor.index} ({tensor.type} {list(tensor.shape)}, {tensor.name!r}) reaches no output"
        for tensor in wiring.graph.tensors
        if tensor.data is not None and tensor.index not in reached
    ]


def _others(found: dit.DiT) -> str:
    """A note on the constants of a DiT's graph that are no weights: what was compared stands for them."""
    wiring = found.wiring
    products = [i for linear in wiring.linears() for i in (linear.weight, linear.bias) if i != -1]
    weights = wiring.constants(products)
    vectors = [array.reshape(-1) for array in found.weights.values()]
    others: Counter[str] = Counter()
    for index in wiring.constants(wiring.graph.outputs) - weights:
        tensor = wiring.graph.tensors[index]
        values = found.evaluator.constant(index).reshape(-1)
        if tensor.type not in (*FLOATS, "INT8", "INT4"):
            others["shapes and axes"] += 1
        elif values.size == 1:
            others[f"the number {values[0]:.7g}"] += 1
        elif not any(np.array_equal(values, vector) for vector in vectors):
            others[f"a table {list(tensor.shape)}"] += 1
    listed = ", ".join(f"{count} × {what}" for what, count in sorted(others.items()))
    return f"constants beside the weights, for which the comparison stands: {listed}"
