"""Exports a tiny random model the way of Arm's recipe: in float32, and in int8 with its global conditioning lost.

One conditioners file serves both. Heads are wider than their rotated part: where they are not, the LiteRT interpreter
of ai-edge-litert 2.3.0 overwrites tensors that it still needs (right with experimental_preserve_all_tensors).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mlx_audio_native.schema import read_json

from . import reference
from .export import DATA
from .recording import PARITY

ARM = DATA / "arm"
# the options of an export, by the name of its golden file
EXPORTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"precision": "int8", "decoder_precision": "int8", "by_position": True},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=ARM, help="a new folder (default: golden/data/arm, replaced)")


def run(args: argparse.Namespace) -> int:
    from .export_model import export
    from .record_tflite import record

    with tempfile.TemporaryDirectory() as scratch:
        model, new = Path(scratch, "model"), Path(scratch, "arm")
        new.mkdir()
        write_model(model)
        shutil.copyfile(model / "model.safetensors", new / "source.safetensors")
        for name, options in EXPORTS.items():
            files = Path(scratch, name)
            export(model, files, **options)
            record(files).write(new / f"{name}.safetensors")
            shutil.copyfile(files / "conditioners_float32.tflite", new / "conditioners.tflite")
            shutil.copyfile(files / "dit_model.tflite", new / f"dit_{name}.tflite")
            shutil.copyfile(files / "autoencoder_model.tflite", new / f"autoencoder_{name}.tflite")
        if args.output == ARM:
            shutil.rmtree(ARM, ignore_errors=True)
        shutil.copytree(new, args.output)
    for path in sorted(args.output.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    return 0


def config() -> dict[str, Any]:
    """The fixture `equal_heads`, smaller."""
    values = read_json(PARITY / "equal_heads" / "config.json")
    coders = values["model"]["pretransform"]["config"]
    for coder in ("encoder", "decoder"):
        coders[coder]["config"].update(c_mults=[1, 2], strides=[2, 4])
    coders["downsampling_ratio"] = 8
    values["sample_size"] = 24 * 8
    prompt = values["model"]["conditioning"]["configs"][0]["config"]
    prompt["max_length"] = 16
    prompt["t5_config"].update(num_layers=1, d_ff=32)
    values["model"]["diffusion"]["config"].update(embed_dim=68, ff_kwargs={"mult": 0.5})
    return values


def write_model(folder: Path) -> None:
    """The model's folder, in float16: whatever starts at zero or one has moved."""
    values = config()
    model = reference.randomise(reference.build(values, seed=3), seed=1, scale=0.2)
    generator = torch.Generator().manual_seed(2)
    for name, buffer in model.named_buffers():
        if name.endswith("norm.beta"):
            buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
    folder.mkdir()
    shutil.copyfile(PARITY / "equal_heads" / "spiece.model", folder / "spiece.model")
    left_out = ("inv_freq", "encoder.embed_tokens.weight")  # the head size; the same as shared.weight
    tensors = {key: value for key, value in model.state_dict().items() if not key.endswith(left_out)}
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
