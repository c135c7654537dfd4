"""Exports a model folder whole by litert-torch, under the names of Arm's recipe: conditioners, dit, autoencoder."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlx_audio_native.errors import InputError
from mlx_audio_native.schema import read_json

from .export_routes import litert_route
from .record_torch import load_reference


class _Conditioners(nn.Module):
    """Ids, mask and one number to tokens, mask and global vector."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text, self.number = (
            model.conditioner.conditioners["prompt"],
            model.conditioner.conditioners["seconds_total"],
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, seconds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        number = self.number
        x = (seconds.clamp(number.min_val, number.max_val) - number.min_val) / (number.max_val - number.min_val)
        embedding = number.embedder(x)
        states = self.text.proj_out(self.text.model(input_ids=ids, attention_mask=mask)[0]) * mask[..., None].float()
        tokens = torch.cat((states, embedding[:, None]), dim=1)
        return tokens, torch.cat((mask.float(), torch.ones_like(seconds)[:, None]), dim=1), embedding


class _DiT(nn.Module):
    """Exported `by_position`, the global vector lands where a mask belongs that nothing reads, and is lost."""

    def __init__(self, model: nn.Module, by_position: bool) -> None:
        super().__init__()
        self.dit, self.by_position = model.model.model, by_position

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, global_cond: torch.Tensor
    ) -> torch.Tensor:
        if self.by_position:
            return self.dit(x, t, tokens, global_cond)
        return self.dit(x, t, cross_attn_cond=tokens, global_embed=global_cond)


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder, self.scale = model.pretransform.model.decoder, model.pretransform.scale

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(latents * self.scale)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--precision", default="float32", choices=("float32", "float16", "int8"), help="of the DiT")
    parser.add_argument("--decoder-precision", default="float32", choices=("float32", "float16", "int8"))
    parser.add_argument("--by-position", action="store_true", help="lose the DiT's global conditioning")


def run(args: argparse.Namespace) -> int:
    export(args.folder, args.output, args.precision, args.by_position, args.decoder_precision)
    return 0


def export(
    folder: Path,
    output: Path,
    precision: str = "float32",
    by_position: bool = False,
    decoder_precision: str = "float32",
) -> None:
    """Write the three files into a new folder. Raises InputError if it exists, or for a model with other numbers."""
    config: dict[str, Any] = read_json(folder / "config.json")
    model = load_reference(folder, config)
    for module in model.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    numbers = [entry["id"] for entry in config["model"]["conditioning"]["configs"] if entry["type"] == "number"]
    if numbers != ["seconds_total"]:
        raise InputError(f"only models with seconds_total alone are exported whole, this one has {', '.join(numbers)}")
    width, diffusion = config["model"]["conditioning"]["cond_dim"], config["model"]["diffusion"]["config"]
    length = model.conditioner.conditioners["prompt"].max_length
    latents = torch.zeros(
        1,
        config["model"]["io_channels"],
        config["sample_size"] // config["model"]["pretransform"]["config"]["downsampling_ratio"],
    )
    ids = torch.ones(1, length, dtype=torch.int64)
    tokens, global_cond = torch.zeros(1, length + 1, width), torch.zeros(1, diffusion["global_cond_dim"])
    if output.exists():
        raise InputError(f"{output} exists already")
    conditioners, dit, decoder = _Conditioners(model).eval(), _DiT(model, by_position).eval(), _Decoder(model).eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        litert_route(conditioners, (ids, ids.clone(), torch.ones(1)), new / "conditioners_float32.tflite")
        litert_route(dit, (latents, torch.ones(1), tokens, global_cond), new / "dit_model.tflite", precision)
        litert_route(decoder, (latents,), new / "autoencoder_model.tflite", decoder_precision)
        new.rename(output)
