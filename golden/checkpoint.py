"""Writes a checkpoint in a release's own layout, of its full size, with random weights of the reference.

The folder holds `model_config.json` and `model.safetensors` with weight norm as g and v, the rotary buffer and no T5;
beside them `text_encoder` as Hugging Face keeps a T5, its decoder included, with a small tokenizer.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from mlx_audio_native.errors import InputError
from mlx_audio_native.releases import OPEN_1_0, SMALL, release_config

from . import fixtures, reference

# of the DiT and of the autoencoder: the first as published, the second half of it, to spare the disk
_DTYPES = {SMALL: (torch.float32, torch.float16), OPEN_1_0: (torch.float16, torch.float32)}


def write(folder: Path, name: str) -> None:
    """Whole or not at all. Raises InputError for a folder that exists."""
    import transformers

    if folder.exists():
        raise InputError(f"{folder} exists already")
    config = release_config(name)
    config["model"]["pretransform"]["scale"] = 0.7  # one that shows if it is not used
    t5_config = config["model"]["conditioning"]["configs"][0]["config"].pop("t5_config")
    # its T5 is not in a checkpoint: the smallest does
    tiny = {"t5_config": {"vocab_size": 8, "d_model": 768, "d_kv": 8, "num_heads": 1, "num_layers": 1, "d_ff": 8}}
    building = copy.deepcopy(config)
    building["model"]["conditioning"]["configs"][0]["config"] |= tiny
    model = reference.randomise(reference.build(building, seed=len(name)), seed=1, scale=0.2)
    dit, autoencoder = _DTYPES[name]
    tensors = {}
    for key, tensor in model.state_dict().items():
        if not key.startswith("conditioner.conditioners.prompt."):
            own = dit if key.startswith("model.") else autoencoder if key.startswith("pretransform.") else torch.float32
            tensors[key] = tensor.to(own).contiguous()
    del model
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        beside = new / "text_encoder"
        beside.mkdir(parents=True)
        save_file(tensors, new / "model.safetensors")
        (new / "model_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors.clear()
        torch.manual_seed(2)
        t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**t5_config)).state_dict()
        tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        save_file({key: t5[key].contiguous() for key in t5 if key not in tied}, beside / "model.safetensors")
        t5_config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", **t5_config}
        (beside / "config.json").write_text(json.dumps(t5_config, indent=2) + "\n", encoding="utf-8")
        (beside / "spiece.model").write_bytes(fixtures.small_tokenizer()[0])
        new.rename(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=_DTYPES)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write: 2 to 4 GB")


def run(args: argparse.Namespace) -> int:
    write(args.folder, args.name)
    files = sorted(path for path in args.folder.rglob("*") if path.is_file())
    print(*(f"{path}: {path.stat().st_size:,} bytes" for path in files), sep="\n")
    return 0
