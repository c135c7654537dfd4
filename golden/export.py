"""Exports of reference conditioners to TFLite, by both public routes and by hand, with the interpreter's outputs.

The two exporters need an environment each: litert-torch comes with the extra `golden`, and for onnx2tf (Python 3.11)
the README has a line. Run the command in both, each makes what it can.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from .export_folded import folded_route
from .export_record import record
from .export_routes import litert_route, onnx2tf_route
from .export_sources import FULL, SOURCES, Conditioners

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Recipe:
    """One file: which source, through which route, at which precision; `half` traces T5 in half precision."""

    source: str
    route: str
    precision: str = "float32"
    half: bool = False
    per_tensor: bool = False

    @property
    def name(self) -> str:
        traced = "_half" if self.half else ""
        return f"{self.source}_{self.route}{traced}_{self.precision}{'_per_tensor' if self.per_tensor else ''}"


RECIPES = [
    *(
        Recipe(s, r, p)
        for s in ("relu", "gated")
        for r in ("onnx2tf", "litert")
        for p in ("float32", "float16", "int8")
    ),
    Recipe("relu", "onnx2tf", "int8", per_tensor=True),
    Recipe("relu", "litert", "int8-weights"),
    Recipe("gated", "litert", "int4-weights"),
    Recipe("relu", "onnx2tf", half=True),
    # onnx2tf transposes the scores of one block here: equal axes, as in `square`
    Recipe("gated", "onnx2tf", half=True),
    Recipe("relu", "folded"),
    Recipe("order", "onnx2tf"),
    Recipe("order", "litert"),
    Recipe("square", "onnx2tf"),
]
_NEEDS = {"onnx2tf": "onnx2tf", "folded": "tensorflow", "litert": "litert_torch"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=DATA, help="where files go (default: golden/data)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only recipes with this in their name")
    parser.add_argument(
        "--full", type=Path, metavar="FILE", help="write a random T5-base's conditioners (440 MB) instead"
    )
    parser.add_argument("--demo", type=Path, metavar="DIR", help="export this model folder's conditioners instead")


def run(args: argparse.Namespace) -> int:
    if args.demo:
        from .export_demo import export_demo

        return export_demo(args.demo, args.output)
    if args.full:
        with torch.no_grad():
            module = Conditioners(FULL, FULL.build()).eval()
            litert_route(module, module.sample(), args.full)
        return 0
    args.output.mkdir(exist_ok=True)
    for recipe in RECIPES:
        if args.only in recipe.name and importlib.util.find_spec(_NEEDS[recipe.route]):
            path = export(recipe, args.output)
            print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)
    return 0


def export(recipe: Recipe, folder: Path) -> Path:
    """Write a recipe's .tflite file, its source's weights and the interpreter's outputs. Returns the first's path."""
    source = SOURCES[recipe.source]
    path = folder / f"{recipe.name}.tflite"
    with torch.no_grad():
        conditioner = source.build()
        state = state_dict(conditioner)
        save_file(state, folder / f"{recipe.source}_source.safetensors")
        module = Conditioners(source, conditioner, recipe.half).eval()
        if recipe.route == "folded":
            folded_route(source, state, path)
        elif recipe.route == "onnx2tf":
            options = {"quant_type": "per-tensor"} if recipe.per_tensor else {}
            onnx2tf_route(module, module.sample(), path, recipe.precision, **options)
        else:
            litert_route(module, module.sample(), path, recipe.precision)
    record(path, recipe.source, source, recipe.name)
    return path


def state_dict(conditioner: torch.nn.Module) -> dict[str, np.ndarray]:
    """The conditioners' weights under their names in a model folder, each once."""
    state = {f"conditioner.{name}": value.float().numpy().copy() for name, value in conditioner.state_dict().items()}
    return {name: value for name, value in state.items() if not name.endswith("embed_tokens.weight")}
