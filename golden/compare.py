"""Holds a model folder against a golden file, stage by stage, in float32; needs no torch.

A GPU may multiply in TF32. The bounds are for full float32, so that TF32 is off unless MLX_ENABLE_TF32=1 is set; with
it, every stage with matrix products is held to TF32's own, wider bound.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_audio_native.errors import MlxAudioError

from .recording import (
    AUDIO,
    BOUNDS,
    CLIP,
    HEADER,
    PARITY,
    TF32_BOUND,
    TF32_SAMPLING_BOUND,
    GoldenError,
    Recording,
    Row,
    bound_of,
    hold,
    sha256,
)

TF32 = "MLX_ENABLE_TF32"
EMBEDDED = (PARITY / "demo.safetensors", PARITY / "demo_tflite.safetensors")


def compare(model: Any, golden: Recording) -> Iterator[Row]:
    """A row for each tensor, in the order of the pipeline. Every stage but the clip is fed what was recorded.

    Raises GoldenError if the golden file is of a model of other sizes.
    """
    for stage, precision in golden.stages.items():
        problem, found = "", {}
        _require_same_sizes(stage, model, golden)
        try:
            found = {name: np.asarray(array) for name, array in _STAGES[stage](model, golden)}
        except MlxAudioError as error:
            problem = str(error)
        yield from hold(found, golden.expected(stage), bound_of(stage, precision, multiplies_in_tf32()), problem)


def _require_same_sizes(stage: str, model: Any, golden: Recording) -> None:
    config, sizes = model.config, {}
    if stage in ("seconds", "conditioning"):
        ids = sorted(number.id for number in config.numbers)
        sizes["numbers"] = (ids, sorted(golden.request.numbers))
    elif stage == "velocity":
        fed = [golden.input("noise")[0], golden.input("cross_attention"), golden.input("global_cond")]
        if len({len(array) for array in fed}) > 1:
            raise GoldenError("the golden file's latents, tokens and global vectors are not as many")
        sizes["latent channels"] = (config.latent_channels, golden.input("noise").shape[-1])
        sizes["conditioning width"] = (config.dit.cond_token_dim, golden.input("cross_attention").shape[-1])
        # a DiT that lost its global conditioning takes a vector of any width
        width = golden.input("global_cond").shape[-1]
        sizes["global width"] = (config.dit.global_cond_dim or width, width)
    elif stage == "decoder":
        sizes["latent channels"] = (config.latent_channels, golden.input("latents").shape[-1])
    elif stage == "encoder":
        sizes["audio channels"] = (config.audio_channels, golden[AUDIO].shape[-1])
    for name, (found, expected) in sizes.items():
        if found != expected:
            raise GoldenError(f"the golden file is of another model: {name} {expected}, here {found}")


def _tokens(model: Any, golden: Recording) -> Iterator[tuple[str, Any]]:
    if model.tokenizer is None:
        raise GoldenError("no spiece.model")
    ids, mask = model.tokenizer.encode(golden.request.prompts)
    yield "tokens.ids", ids
    yield "tokens.mask", mask


def _text(model: Any, golden: Recording) -> Iterator[tuple[str, Any]]:
    import mlx.core as mx

    mask = mx.array(golden.input("mask"))
    yield "text.states", model.conditioner.t5(mx.array(golden.input("ids")), mask) * mask[..., None]


def _encode(model: Any, golden: Recording) -> Any:
    return model.conditioner.encode(golden.input("ids"), golden.input("mask"), **golden.request.numbers)


def _seconds(model: Any, golden: Recording) -> Iterator[tuple[str, Any]]:
    yield "seconds.global_cond", _encode(model, golden).global_cond


def _conditioning(model: Any, golden: Recording) -> Iterator[tuple[str, Any]]:
    encoded = _encode(model, golden)
    yield "conditioning.cross_attention", encoded.cross_attention
    yield "conditioning.mask", encoded.mask


def _velocity(model: Any, golden: Recording) -> Iterator[tuple[str, Any]]:
    import mlx.core as mx

    tokens, global_cond = mx.array(golden.input("cross_attention")), mx.array(golden.input("global_cond"))
    first, times = mx.array(golden.input("noise")[0]), golden.request.times
    for t in times:
        yield f"velocity.t={t:g}", model.dit(first, mx.full((len(first),), t), tokens, global_cond)
    if "velocity.window" in golden.tensors:
        whole = mx.array(golden.input("window"))
        yield "velocity.window", model.dit(whole, mx.full((1,), times[-2]), tokens[:1], global_cond[:1])


def _sampling(model: Any, golden: Recording) -> Iterator[tuple[str, Any]]:
    for run in golden.request.runs:
        for step, latents in enumerate(_sample(model, golden, run), start=1):
            yield f"sampling.{run.name}.{step}", latents


def _sample(model: Any, golden: Recording, run: Any) -> Iterator[Any]:
    """Latents after each step, from the prompts on, with the recorded noise."""
    import mlx.core as mx

    from mlx_audio_native.request import check_request
    from mlx_audio_native.sampling import sample_noise

    clips = golden.request.seconds
    negative = golden.request.negative_prompt if run.negative else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that guidance adds artefacts is not the question
        request = check_request(
            model.config,
            golden.request.prompts[: len(clips)],
            seconds=clips,
            seed=0,
            steps=run.steps,
            sampler=run.sampler,
            cfg_scale=run.cfg_scale,
            negative_prompt=negative,
        )
    for state in sample_noise(model.velocity(request), _draws(golden), request.sampler, request.steps):
        mx.eval(state.latents)
        yield state.latents


def _draws(golden: Recording) -> Iterator[Any]:
    import mlx.core as mx

    yield from mx.array(golden.input("noise"))
    raise GoldenError("the golden file has less noise than its samplings draw")


def _decoder(model: Any, golden: Recording) -> Iterator[tuple[str, Any]]:
    import mlx.core as mx

    yield "decoder.audio", model.autoencoder.decode(mx.array(golden.input("latents")))


def _encoder(model: Any, golden: Recording) -> Iterator[tuple[str, Any]]:
    import mlx.core as mx

    yield "encoder.latents", model.autoencoder.encode(mx.array(golden["decoder.audio"]))


def _clip(model: Any, golden: Recording) -> Iterator[tuple[str, Any]]:
    *_, latents = _sample(model, golden, golden.request.runs[0])
    yield CLIP, model.autoencoder.decode(latents)


_STAGES = {
    "tokens": _tokens,
    "text": _text,
    "seconds": _seconds,
    "conditioning": _conditioning,
    "velocity": _velocity,
    "sampling": _sampling,
    "decoder": _decoder,
    "encoder": _encoder,
    "clip": _clip,
}

# what a stage runs; the others run all of a model
_PARTS = {
    **dict.fromkeys(("tokens", "text", "seconds", "conditioning"), "conditioner"),
    "velocity": "dit",
    **dict.fromkeys(("decoder", "encoder"), "autoencoder"),
}


def parts_for(goldens: list[Recording]) -> list[str]:
    """The parts that a model must have to be compared."""
    from mlx_audio_native.config import PARTS

    wanted = {_PARTS.get(stage) for golden in goldens for stage in golden.stages}
    return [part for part in PARTS if part in wanted or None in wanted]


def multiplies_in_tf32() -> bool:
    """Whether matrix products may round what they multiply to TF32, which no CPU does."""
    import mlx.core as mx

    return os.environ.get(TF32, "1") != "0" and mx.default_device() == mx.gpu


def add_golden_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared: a model folder, a golden file, and of which stages."""
    parser.add_argument("folder", type=Path, nargs="?", metavar="MODEL_FOLDER", help="default: the embedded model")
    parser.add_argument("golden", type=Path, nargs="?", metavar="GOLDEN", help="default: both of the embedded model's")
    parser.add_argument("--stages", nargs="+", choices=BOUNDS, metavar="STAGE", help=f"of {', '.join(BOUNDS)}")
    parser.add_argument("--compile", action="store_true", help="on a GPU, the compiled model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_golden_arguments(parser)
    parser.epilog = (
        f"Exit status 1 if a row is not OK. With {TF32}=1 in the environment a GPU may multiply in TF32; all rows but "
        f"tokens and seconds are then held to {TF32_BOUND.measure} {TF32_BOUND.limit:g}, sampling and clip to "
        f"{TF32_SAMPLING_BOUND.limit:g}."
    )


def asked_for(args: argparse.Namespace) -> list[Recording]:
    """The golden file, or the embedded model's. TF32 is off from here on, unless the environment says otherwise."""
    if (args.folder is None) != (args.golden is None):
        raise GoldenError("give both a model folder and a golden file, or neither")
    os.environ.setdefault(TF32, "0")  # read when MLX first multiplies
    goldens = [Recording.read(path) for path in ([args.golden] if args.golden else EMBEDDED)]
    for stage in args.stages or ():
        if not any(stage in golden.stages for golden in goldens):
            raise GoldenError(f"the stage {stage} was not recorded, only {', '.join(goldens[0].stages)}")
    wanted = args.stages or BOUNDS
    kept = [replace(g, stages={stage: g.stages[stage] for stage in g.stages if stage in wanted}) for g in goldens]
    return [golden for golden in kept if golden.stages]


def run(args: argparse.Namespace) -> int:
    """0 if every row is OK, else 1."""
    goldens = asked_for(args)
    from mlx_audio_native import load

    model = load(args.folder, parts=parts_for(goldens), dtype="float32")
    if args.compile:
        model.compile()
    print(where())
    failed: dict[str, int] = {}
    for golden in goldens:
        print("", *describe(model.folder, golden), "", HEADER, sep="\n")
        for row in compare(model, golden):
            print(row, flush=True)
            if not row.ok:
                failed[row.stage] = failed.get(row.stage, 0) + 1
    if failed:
        print(f"\nNOT OK: {', '.join(f'{stage} ({count})' for stage, count in failed.items())}")
        return 1
    print("\nOK")
    return 0


def where() -> str:
    """The machine that compares."""
    import mlx.core as mx

    device, tf32 = mx.device_info().get("device_name", mx.default_device()), multiplies_in_tf32()
    return f"MLX {mx.__version__}, {device}, TF32 {'on, so the bounds are wider' if tf32 else 'off'}"


def describe(folder: Path, golden: Recording) -> Iterator[str]:
    """What is compared with what."""
    for key, value in sorted(golden.provenance.items()):
        yield f"golden {key}: {value}"
    told = ""
    if "sha256" in golden.provenance:
        same = sha256(folder / "model.safetensors") == golden.provenance["sha256"]
        told = f", {'' if same else 'not '}the file recorded from"
    yield f"model: {folder}{told}"
    for stage, precision in golden.stages.items():
        if precision != "float32":
            yield f"{stage}: recorded from {precision} weights, so the bound is {bound_of(stage, precision).limit:g}"
