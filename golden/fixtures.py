"""Small reference models of random weights, whose shapes and values hide no error; written as model folders.

`equal_heads`: as many key/value heads as query heads, q/k LayerNorm over values of variance 1e-6, rotary on part of
each head, relu, 64 tokens. `fewer_heads`: half as many key/value heads, two numbers, gated GELU with a projection, 128
tokens cropped to 64, guidance by default. `v_objective`: stable-audio-open-1.0 on a small scale, so half as many
key/value heads, two numbers, relu, 128 tokens, the objective v. In all, weights that start at zero or one have moved.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from . import reference

WORDS = "kick drum snare hi-hat loop sine tone saw bass square lead plucked string rising falling BPM C D E F G A B #"


def _config(oobleck: dict[str, Any], prompt: dict[str, Any], numbers: list[str], top: int, diffusion: dict[str, Any]):
    latents, cond_dim = diffusion["config"]["io_channels"], diffusion["config"]["cond_token_dim"]
    ratio = 1
    for stride in oobleck["strides"]:
        ratio *= stride
    number = {"type": "number", "config": {"min_val": 0, "max_val": top}}
    return {
        "model_type": "diffusion_cond",
        "sample_size": 40 * ratio,
        "sample_rate": 7 * ratio,
        "audio_channels": 2,
        "model": {
            "pretransform": {
                "type": "autoencoder",
                "config": {
                    "encoder": {"type": "oobleck", "config": {"in_channels": 2, "latent_dim": 2 * latents, **oobleck}},
                    "decoder": {
                        "type": "oobleck",
                        "config": {"out_channels": 2, "latent_dim": latents, **oobleck, "final_tanh": False},
                    },
                    "bottleneck": {"type": "vae"},
                    "latent_dim": latents,
                    "downsampling_ratio": ratio,
                    "io_channels": 2,
                },
                "scale": 0.7,
            },
            "conditioning": {
                "configs": [
                    {"id": "prompt", "type": "t5", "config": prompt},
                    *({"id": id_, **number} for id_ in numbers),
                ],
                "cond_dim": cond_dim,
            },
            "diffusion": {
                "cross_attention_cond_ids": ["prompt", *numbers],
                "global_cond_ids": numbers,
                "type": "dit",
                **diffusion,
            },
            "io_channels": latents,
        },
    }


def _t5(vocabulary: int, d_model: int, feed_forward: str) -> dict[str, Any]:
    sizes = {"vocab_size": vocabulary, "d_model": d_model, "d_kv": 16, "num_heads": 2, "num_layers": 2, "d_ff": 48}
    return {**sizes, "feed_forward_proj": feed_forward, "dropout_rate": 0.0}


def _equal_heads(vocabulary: int) -> dict[str, Any]:
    dit = {"io_channels": 8, "embed_dim": 96, "depth": 2, "num_heads": 2, "cond_token_dim": 32, "global_cond_dim": 32}
    return _config(
        # one level keeps its width, so that its transposed convolution is square
        {"channels": 4, "c_mults": [2, 2, 4], "strides": [2, 4, 4], "use_snake": True},
        {"max_length": 64, "t5_config": _t5(vocabulary, 32, "relu")},
        ["seconds_total"],
        256,
        {
            "diffusion_objective": "rf_denoiser",
            "config": {**dit, "attn_kwargs": {"qk_norm": "ln"}, "ff_kwargs": {"mult": 1.0}},
        },
    )


def _fewer_heads(vocabulary: int) -> dict[str, Any]:
    dit = {"io_channels": 8, "embed_dim": 128, "depth": 2, "num_heads": 4, "cond_token_dim": 64, "global_cond_dim": 128}
    return _config(
        {"channels": 4, "c_mults": [1, 2], "strides": [4, 8], "use_snake": False},
        {"max_length": 64, "encode_length": 128, "t5_config": _t5(vocabulary, 32, "gated-gelu")},
        ["seconds_start", "seconds_total"],
        512,
        {
            "diffusion_objective": "rectified_flow",
            "config": {**dit, "project_cond_tokens": False, "ff_kwargs": {"mult": 0.5}},
        },
    )


def _v_objective(vocabulary: int) -> dict[str, Any]:
    dit = {"io_channels": 8, "embed_dim": 128, "depth": 2, "num_heads": 4, "cond_token_dim": 64, "global_cond_dim": 128}
    return _config(
        {"channels": 4, "c_mults": [1, 2], "strides": [4, 8], "use_snake": True},
        {"max_length": 128, "t5_config": _t5(vocabulary, 64, "relu")},
        ["seconds_start", "seconds_total"],
        512,
        {
            "diffusion_objective": "v",
            "config": {**dit, "project_cond_tokens": False, "ff_kwargs": {"mult": 0.5}},
        },
    )


FIXTURES = {"equal_heads": _equal_heads, "fewer_heads": _fewer_heads, "v_objective": _v_objective}


def small_tokenizer() -> tuple[bytes, int]:
    """A spiece.model of a few kilobytes, with T5's special ids, and how many pieces it has."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20),
        model_writer=model,
        vocab_size=100,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue(), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def write(folder: Path, name: str) -> None:
    """The fixture's model folder, in float16 and with weight norm as g and v; an existing one is replaced."""
    spiece, vocabulary = small_tokenizer()
    config = FIXTURES[name](vocabulary)
    model = reference.randomise(reference.build(config, seed=len(name)), seed=1, scale=0.2)
    _sharpen(model)
    if name == "equal_heads":
        _shrink_queries_and_keys(model)
    tensors = {
        key: tensor.half().contiguous()
        for key, tensor in model.state_dict().items()
        if not key.endswith(("inv_freq", "encoder.embed_tokens.weight"))  # the head size; the same as shared.weight
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        save_file(tensors, new / "model.safetensors")
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (new / "spiece.model").write_bytes(spiece)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def _sharpen(model: nn.Module) -> None:
    """Norms get the offsets that the reference keeps in buffers of zeros; cross-attention tells its tokens apart."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("norm.beta"):
                buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
        for layer in model.model.model.transformer.layers:
            layer.cross_attn.to_q.weight *= 4
            layer.cross_attn.to_kv.weight *= 4


def _shrink_queries_and_keys(model: nn.Module) -> None:
    """Down to a variance near 1e-6, where their norm's epsilon of 1e-6 counts as much as they do."""
    for layer in model.model.model.transformer.layers:
        width = layer.self_attn.to_out.weight.shape[0]
        with torch.no_grad():
            layer.self_attn.to_qkv.weight[: 2 * width] *= 2e-3
            layer.cross_attn.to_q.weight *= 5e-4
