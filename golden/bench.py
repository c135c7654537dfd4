"""The runtime beside the reference: the same weights and work, taken in turns, and the ratio of their times.

Each turn begins with a run that is not counted, on every side: what ran before was another process, which leaves the
caches of processor and GPU cold.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from mlx_audio_native.errors import InputError
from mlx_audio_native.releases import OPEN_1_0, SMALL, release_config

from .bench_side import Side, open_side
from .recording import DEMO

_A_TURN = 3  # counted runs


def write_random(folder: Path, config: dict[str, Any]) -> None:
    """A model folder of the weights that `mlx-audio-native bench --random` makes."""
    from mlx_audio_native.bench import TOKENIZER, random_tensors
    from mlx_audio_native.config import ModelConfig
    from mlx_audio_native.weights import build, save

    save(folder, config, random_tensors(build(ModelConfig.from_dict(config), {})), TOKENIZER)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The runtime's report, and under `sides` what each other side is and its times. Raises MlxAudioError."""
    from mlx_audio_native import load
    from mlx_audio_native.bench import PROMPT, Bench

    if args.runs < 1:
        raise InputError(f"--runs must be at least 1, not {args.runs}")
    start = time.perf_counter()
    model = load(folder, dtype=args.dtype).compile()  # beside a reference that is
    load_seconds = time.perf_counter() - start
    bench = Bench(model, args.seconds, args.steps, args.batch)
    asked = bench.asked()
    options = {key: asked[key] for key in ("dtype", "seconds", "steps", "sampler", "cfg_scale", "batch")}
    options |= {
        "folder": str(folder.resolve()),
        "prompt": PROMPT,
        "tf32": os.environ.get("MLX_ENABLE_TF32", "1") != "0",
        "shape": (args.batch, model.config.latent_length, model.config.latent_channels),
        "latents": bench.latents,
    }
    with ExitStack() as stack:
        torch = args.torch_python
        sides = [stack.enter_context(open_side("torch", "bench_torch", torch, compile=False, **options))]
        if sides[0].about["cuda"]:
            compiled = open_side("torch.compile", "bench_torch", torch, compile=True, **options)
            sides.append(stack.enter_context(compiled))
        if args.tflite:
            files = {"folder": str(args.tflite.resolve()), "steps": options["steps"]}
            sides.append(stack.enter_context(open_side("LiteRT", "bench_litert", args.litert_python, **files)))
        for side in sides:
            side.run()
            for _ in range(side.about["warm_up"] - 1):
                side.warm_up()
        bench.run()
        for done in range(0, args.runs, _A_TURN):
            for each in (bench, *sides):
                each.warm_up()
                for _ in range(min(_A_TURN, args.runs - done)):
                    each.run()
        return {**bench.report(load_seconds), "sides": {side.name: _rows(side) for side in sides}}


def _rows(side: Side) -> dict[str, Any]:
    stages = {}
    for stage, (first, *warm) in side.seconds.items():
        stages[stage] = {"first": first, "median": median(warm), "minimum": min(warm)}
    return {"about": side.about, "stages": stages}


def ratios(report: dict[str, Any]) -> Iterator[str]:
    """Each side's times beside the runtime's as lines of Markdown; a ratio below 1 means that the runtime is faster."""
    for name, side in report["sides"].items():
        yield ""
        yield f"{name}: {', '.join(f'{key} {value}' for key, value in side['about'].items())}"
        yield ""
        yield f"| milliseconds | MLX median | minimum | {name} median | minimum | ratio of medians | of minima |"
        yield "|---|---:|---:|---:|---:|---:|---:|"
        for stage, ours in report["stages"].items():
            if theirs := side["stages"].get(stage):
                times = [row[key] for row in (ours, theirs) for key in ("median", "minimum")]
                shown = " | ".join(f"{seconds * 1e3:.2f}" for seconds in times)
                quotients = " | ".join(f"{ours[key] / theirs[key]:.2f}" for key in ("median", "minimum"))
                yield f"| {stage} | {shown} | {quotients} |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, default=DEMO, metavar="DIR", help="default: the embedded model")
    model.add_argument("--random", choices=(SMALL, OPEN_1_0), help="the sizes of this model, with random weights")
    add("--seconds", type=float, help="length of the clip (default: the model's window)")
    add("--steps", type=int, help="sampling steps (default: what the model is made for)")
    add("--batch", type=int, default=1, metavar="N", help="clips at once (default: 1)")
    add("--dtype", help="float16, bfloat16 or float32, on both sides (default: what generate takes)")
    counted = f"counted ones of each side: up to {_A_TURN} a turn, after one that only warms up (default: 6)"
    add("--runs", type=int, default=6, metavar="N", help=counted)
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    python = {"metavar": "PYTHON", "default": sys.executable}
    add("--torch-python", help="the interpreter that has torch (default: this one)", **python)
    add("--tflite", type=Path, metavar="DIR", help="also LiteRT, with the files that export-model wrote")
    add("--litert-python", help="the interpreter that has ai-edge-litert (default: this one)", **python)


def run(args: argparse.Namespace) -> int:
    from mlx_audio_native.bench import table, write_json

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model
        if args.random:
            folder = Path(scratch) / args.random
            write_random(folder, release_config(args.random))
        report = measure(folder, args)
    print("\n".join([*table(report), *ratios(report)]))
    if args.json:
        write_json(report, args.json)
    return 0
