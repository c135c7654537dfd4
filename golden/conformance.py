"""How far each stage is from the float32 reference, in every precision: what the default dtypes rest on."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .compare import add_golden_arguments, asked_for, compare, describe, parts_for, where
from .recording import DEMO, GoldenError, Recording, Row

_GROUP_SIZE = 64
PRECISIONS = ("float32", "float16", "bfloat16", "8-bit", "4-bit")


def _load(folder: Path, parts: list[str], precision: str) -> Any:
    """The model as converted to a precision and loaded again; its conditioner computes in float32 all the same."""
    import mlx.core as mx

    from mlx_audio_native import load
    from mlx_audio_native.convert import convert
    from mlx_audio_native.quantization import Quantization

    dtype, quantization = precision, None
    if precision.endswith("-bit"):
        dtype, quantization = "float32", Quantization(int(precision[0]), _GROUP_SIZE)
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "converted"
        convert(folder, converted, dtype, quantization)
        model = load(converted, parts=parts, dtype=dtype)
        mx.eval([getattr(model, part).parameters() for part in parts])  # before the file goes
    return model


def _one_sampling(golden: Recording) -> Recording:
    """The golden of the default sampler alone, and of its last step."""
    if not golden.request.runs:
        return golden
    run = golden.request.runs[0]
    last = f"sampling.{run.name}.{run.steps}"
    tensors = {n: array for n, array in golden.tensors.items() if not n.startswith("sampling.") or n == last}
    return replace(golden, tensors=tensors, request=replace(golden.request, runs=(run,)))


def worst(rows: list[Row]) -> Iterator[Row]:
    """Of each stage, the row farthest off. Raises GoldenError for a stage that was not made."""
    for stage in dict.fromkeys(row.stage for row in rows):
        of_stage = [row for row in rows if row.stage == stage]
        compared = [row for row in of_stage if not row.problem]
        if not compared:
            raise GoldenError(f"{of_stage[0].name} {of_stage[0].problem}")
        # nothing is farther off than what is no number
        yield max(compared, key=lambda row: (math.isnan(row.relative_rms), row.relative_rms))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_golden_arguments(parser)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)


def run(args: argparse.Namespace) -> int:
    goldens = [_one_sampling(golden) for golden in asked_for(args)]
    folder = args.folder or DEMO
    print(where())
    for golden in goldens:
        print("", *describe(folder, golden), "", sep="\n")
        print(f"{'stage':<14}{'precision':<11}{'max abs':>10}{'rel rms':>10}{'cosine':>14}")
        for precision in args.precision:
            start = time.perf_counter()
            model = _load(folder, parts_for([golden]), precision)
            if args.compile:
                model.compile()
            for row in worst(list(compare(model, golden))):
                if row.stage != "tokens":
                    figures = f"{row.max_abs:10.1e}{row.relative_rms:10.1e}{row.cosine:14.9f}"
                    print(f"{row.stage:<14}{precision:<11}{figures}", flush=True)
            print(f"{'':<14}{precision:<11}{time.perf_counter() - start:9.1f} s", flush=True)
    return 0
