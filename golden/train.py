"""Trains the embedded demo model from nothing: tokenizer, autoencoder, then text, seconds and DiT. Needs one large GPU.

`python -m golden train --output DIR` takes about half an hour and writes the model folder: the conditioner in float32,
the rest in float16, weight norm fused. Each stage leaves its checkpoint in DIR.stages and is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from golden.demo_config import demo_config
from mlx_audio_native.errors import InputError

_AUTOENCODER = "pretransform.model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the model folder to write")
    parser.add_argument("--autoencoder-minutes", type=float, default=16.0)
    parser.add_argument("--diffusion-minutes", type=float, default=10.0)
    parser.add_argument(
        "--start",
        type=Path,
        metavar="DIR",
        help="a model folder of these sizes to go on from; with 0 minutes its autoencoder is kept",
    )
    parser.add_argument("--clips", type=int, default=40_960, help="rendered for the DiT")
    parser.add_argument("--device", default="cuda")


def run(args: argparse.Namespace) -> int:
    import torch
    from safetensors.torch import load_file, save_file

    from golden import train_autoencoder, train_diffusion, train_tokenizer

    if args.output.exists():
        raise InputError(f"{args.output} exists already")
    device = torch.device(args.device)
    stages = args.output.with_name(args.output.name + ".stages")
    stages.mkdir(parents=True, exist_ok=True)
    spiece, autoencoder = stages / "spiece.model", stages / "autoencoder.safetensors"
    if not spiece.exists():
        spiece.write_bytes((args.start / "spiece.model").read_bytes() if args.start else train_tokenizer.train())
    config = demo_config(train_tokenizer.pieces(spiece))
    start = load_file(args.start / "model.safetensors") if args.start else {}
    rest = {name: tensor.float() for name, tensor in start.items()}
    coder = {name.removeprefix(_AUTOENCODER): rest.pop(name) for name in start if name.startswith(_AUTOENCODER)}
    if not autoencoder.exists():
        if not coder or args.autoencoder_minutes > 0:
            seconds = 60 * args.autoencoder_minutes
            trained = train_autoencoder.train(
                config, seconds, device, clips=6144, batch=16, frames=32, start=coder or None
            )
            print(json.dumps(train_autoencoder.quality(trained, device)), flush=True)
            coder = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
        save_file(coder, autoencoder)
    model = train_diffusion.train(
        config, load_file(autoencoder), spiece, 60 * args.diffusion_minutes, device, args.clips, rest or None
    )
    write(args.output, config, model, spiece)
    return 0


def write(folder: Path, config: dict[str, Any], model: Any, spiece: Path) -> None:
    """A model folder from a reference model. Fuses the model's weight norm for good."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    for module in model.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("inv_freq", "encoder.embed_tokens.weight")):
            continue  # follows from the head size; the same as shared.weight
        half = not name.startswith("conditioner.") and "timestep_features" not in name
        tensors[name] = tensor.to(torch.float16 if half else torch.float32).cpu().contiguous()
    new = folder.with_name(folder.name + ".new")
    new.mkdir()
    save_file(tensors, new / "model.safetensors")
    (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (new / "spiece.model").write_bytes(spiece.read_bytes())
    new.rename(folder)
