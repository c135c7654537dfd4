"""How far each stage is from the float32 reference, in every precision: what the default dtypes rest on."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .compare import add_golden_arguments, asked_for, compare, describe, parts_for, where
from .recording import Recording, Row

_GROUP = 64


def _quantise(weight: Any, bits: int) -> Any:
    """A weight as `bits` bits a value, in groups of 64 with a scale and an offset, would give it back."""
    import mlx.core as mx

    rows = weight.reshape(len(weight), -1)
    if rows.shape[1] % _GROUP:
        return weight
    return mx.dequantize(*mx.quantize(rows, _GROUP, bits), _GROUP, bits).reshape(weight.shape)


def _change_weights(module: Any, change: Callable[[Any], Any]) -> None:
    from mlx.utils import tree_map

    module.update(tree_map(lambda array: change(array) if array.ndim > 1 else array, module.parameters()))


def _load(folder: Path | None, parts: list[str], precision: str) -> Any:
    """The model in a precision. The conditioner always computes in float32, from weights that were rounded."""
    import mlx.core as mx

    from mlx_audio_native import load

    if precision.endswith("-bit"):
        model = load(folder, parts=parts, dtype="float32")
        for part in parts:
            _change_weights(getattr(model, part), lambda weight: _quantise(weight, int(precision[0])))
        return model
    model = load(folder, parts=parts, dtype=precision)
    if "conditioner" in parts:
        dtype = getattr(mx, precision)
        _change_weights(model.conditioner, lambda weight: weight.astype(dtype).astype(mx.float32))
    return model


PRECISIONS = ("float32", "float16", "bfloat16", "8-bit", "4-bit")


def _one_sampling(golden: Recording) -> Recording:
    """The golden of the default sampler alone, and of its last step."""
    if not golden.request.runs:
        return golden
    run = golden.request.runs[0]
    last = f"sampling.{run.name}.{run.steps}"
    tensors = {n: array for n, array in golden.tensors.items() if not n.startswith("sampling.") or n == last}
    return replace(golden, tensors=tensors, request=replace(golden.request, runs=(run,)))


def worst(rows: list[Row]) -> Iterator[Row]:
    """Of each stage, the row farthest off."""
    for stage in dict.fromkeys(row.stage for row in rows):
        of_stage = [row for row in rows if row.stage == stage and not row.problem]
        yield max(of_stage, key=lambda row: row.relative_rms)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_golden_arguments(parser)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)


def run(args: argparse.Namespace) -> int:
    goldens = [_one_sampling(golden) for golden in asked_for(args)]
    print(where())
    for golden in goldens:
        for index, precision in enumerate(args.precision):
            start = time.perf_counter()
            model = _load(args.folder, parts_for([golden]), precision)
            if index == 0:
                print("", *describe(model, golden), "", sep="\n")
                print(f"{'stage':<14}{'precision':<11}{'max abs':>10}{'rel rms':>10}{'cosine':>14}")
            for row in worst(list(compare(model, golden))):
                if row.stage != "tokens":
                    figures = f"{row.max_abs:10.1e}{row.relative_rms:10.1e}{row.cosine:14.9f}"
                    print(f"{row.stage:<14}{precision:<11}{figures}", flush=True)
            print(f"{'':<14}{precision:<11}{time.perf_counter() - start:9.1f} s", flush=True)
    return 0
