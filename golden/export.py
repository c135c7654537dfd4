"""Exports of reference conditioners to TFLite, by both public routes and by hand, with the interpreter's outputs.

The two exporters need an environment each: litert-torch comes with the extra `golden`, and for onnx2tf (Python 3.11)
the README has a line. Run the command in both, each makes what it can.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from .export_folded import folded_route
from .export_record import INPUTS, record
from .export_record import run as run_interpreter
from .export_routes import litert_route, onnx2tf_route
from .export_sources import FULL, SOURCES, Conditioners
from .recording import Bound, bound_of, hold

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

    @property
    def is_possible(self) -> bool:
        """Whether its exporter is installed."""
        return importlib.util.find_spec(_NEEDS[self.route]) is not None

    @property
    def bound(self) -> Bound:
        """How far one machine's interpreter may be from another's: int8 activations round to other integers."""
        precision = "int8" if "int" in self.precision else "float16" if self.half else self.precision
        return bound_of("conditioning", precision)


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
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; 1 if what a stored file gives is not what was recorded of it",
    )


def run(args: argparse.Namespace) -> int:
    if args.demo:
        from .export_demo import export_demo

        return export_demo(args.demo, args.output)
    if args.full:
        with torch.no_grad():
            module = Conditioners(FULL, FULL.build()).eval()
            litert_route(module, module.sample(), args.full)
        return 0
    recipes = [recipe for recipe in RECIPES if args.only in recipe.name]
    if args.check:
        return int(sum(_has_drifted(recipe, args.output) for recipe in recipes) > 0)
    args.output.mkdir(exist_ok=True)
    for recipe in recipes:
        if recipe.is_possible:
            path = export(recipe, args.output)
            print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)
    return 0


def _has_drifted(recipe: Recipe, folder: Path) -> bool:
    """Whether a stored file, exported again where the exporter is here, gives what was recorded."""
    stored = load_file(folder / f"{recipe.name}.safetensors")
    inputs = {name: stored.pop(name) for name in INPUTS}
    with tempfile.TemporaryDirectory() as scratch:
        path = export(recipe, Path(scratch)) if recipe.is_possible else folder / f"{recipe.name}.tflite"
        rows = list(hold(run_interpreter(path, inputs), stored, recipe.bound))
    how = "exported again" if recipe.is_possible else "the stored file"
    print(f"{recipe.name}, {how}: {'as recorded' if all(row.ok for row in rows) else 'drifted'}", flush=True)
    for row in rows:
        if not row.ok:
            print(f"  {row}", flush=True)
    return not all(row.ok for row in rows)


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
