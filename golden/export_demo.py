"""The embedded model's conditioner on its way through a TFLite file: exported, extracted again, and put back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

import extraction
from mlx_audio_native.weights import read_tensors, save

from . import reference
from .export_record import record
from .export_routes import litert_route
from .export_sources import Conditioners, Source

NAME = "demo_conditioners_float32"


def export_demo(folder: Path, output: Path) -> int:
    """Export the conditioners of a model folder, extract them, and write what was extracted back into the folder.

    Returns 1, with a line for each tensor that changed on the way, if any did; the folder is then left as it is.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    path = output / f"{NAME}.tflite"
    source = _source(config)
    with torch.no_grad():
        module = Conditioners(source, _conditioner(config, folder)).eval()
        litert_route(module, module.sample(), path)
    record(path, "demo", source, "demo_litert_float32")
    before = {name: np.asarray(value) for name, value in read_tensors(folder, ("conditioner",)).items()}
    with tempfile.TemporaryDirectory() as scratch:
        print("\n".join(extraction.extract(path, Path(scratch, "model")).lines()))
        after = load_file(Path(scratch, "model", "model.safetensors"))
        extracted = json.loads(Path(scratch, "model", "config.json").read_text(encoding="utf-8"))
    changed = [name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))]
    for name in sorted(changed):
        print(f"{name}: changed on the way through {path.name}")
    if changed:
        return 1
    config["model"]["conditioning"] = extracted["model"]["conditioning"]
    spiece = folder / "spiece.model"
    spiece = spiece if spiece.exists() else None
    save(folder, config, {**read_tensors(folder), **after}, spiece, overwrite=True)
    print(f"{folder}: {len(after)} tensors of the conditioner, byte for byte those of {path.name}")
    return 0


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def _source(config: dict[str, Any]) -> Source:
    conditioning = config["model"]["conditioning"]
    entries = {entry["id"]: entry for entry in conditioning["configs"]}
    prompt = next(entry["config"] for entry in entries.values() if entry["type"] == "t5")
    ids = config["model"]["diffusion"]["global_cond_ids"]
    return Source(
        t5=prompt["t5_config"],
        cond_dim=conditioning["cond_dim"],
        encode_length=prompt.get("encode_length", prompt["max_length"]),
        max_length=prompt["max_length"],
        numbers=tuple((id_, entries[id_]["config"]["min_val"], entries[id_]["config"]["max_val"]) for id_ in ids),
    )


def _conditioner(config: dict[str, Any], folder: Path) -> torch.nn.Module:
    """The reference's conditioners with the folder's weights."""
    conditioner = reference.build(config).conditioner.eval().requires_grad_(False)
    tensors = load_file(folder / "model.safetensors")
    prefix = "conditioner."
    state = {name[len(prefix) :]: torch.from_numpy(v) for name, v in tensors.items() if name.startswith(prefix)}
    table = "conditioners.prompt.model.shared.weight"
    state[table.replace("shared", "encoder.embed_tokens")] = state[table]
    conditioner.load_state_dict(state, strict=True)
    return conditioner
