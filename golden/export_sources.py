"""Small random conditioners of the reference, as modules that exporters can trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import reference

_SEED = 11


@dataclass(frozen=True)
class Source:
    """Reference conditioners to export: `encode_length` tokens go through T5, `max_length` come out.

    `numbers` are (id, min, max); `order` is that of the features, and `frequencies` the reference's own number or not.
    """

    t5: dict[str, Any]
    cond_dim: int
    encode_length: int
    max_length: int
    numbers: tuple[tuple[str, float, float], ...] = (("seconds_total", 0, 256),)
    order: tuple[str, ...] = ("x", "sin", "cos")
    frequencies: int = 128

    def config(self) -> dict[str, Any]:
        """A model config around the conditioners, with the smallest DiT there is: the reference builds both or none."""
        ids = [id_ for id_, _, _ in self.numbers]
        prompt = {"t5_model_name": "t5-base", "max_length": self.max_length, "t5_config": self.t5}
        numbers = [{"id": n, "type": "number", "config": {"min_val": a, "max_val": b}} for n, a, b in self.numbers]
        dit = {"io_channels": 4, "embed_dim": 32, "depth": 1, "num_heads": 1, "cond_token_dim": self.cond_dim}
        return {
            "model_type": "diffusion_cond",
            "sample_size": 4096,
            "sample_rate": 44100,
            "model": {
                "conditioning": {
                    "cond_dim": self.cond_dim,
                    "configs": [{"id": "prompt", "type": "t5", "config": prompt}, *numbers],
                },
                "diffusion": {
                    "type": "dit",
                    "cross_attention_cond_ids": ["prompt", *ids],
                    "global_cond_ids": ids,
                    "diffusion_objective": "rf_denoiser",
                    "config": {
                        **dit,
                        "global_cond_dim": self.cond_dim * len(ids),
                        "transformer_type": "continuous_transformer",
                    },
                },
                "io_channels": 4,
            },
        }

    def build(self) -> nn.Module:
        """The reference's conditioners with random weights, none of which is exact in half precision."""
        conditioner = reference.build(self.config(), seed=_SEED).conditioner.eval().requires_grad_(False)
        if self.frequencies != 128:
            from stable_audio_tools.models.adp import NumberEmbedder

            for id_, _, _ in self.numbers:
                conditioner.conditioners[id_].embedder = NumberEmbedder(self.cond_dim, 2 * self.frequencies)
        generator = torch.Generator().manual_seed(_SEED)
        for parameter in conditioner.parameters():
            parameter.requires_grad_(False).add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return conditioner


def _t5(**sizes: Any) -> dict[str, Any]:
    return {"dropout_rate": 0.0, "is_encoder_decoder": False, "use_cache": False, **sizes}


# no two sizes of a source are equal: onnx2tf confuses axes of one size, which `square` shows on purpose
SOURCES = {
    "relu": Source(
        _t5(vocab_size=96, d_model=40, d_kv=16, num_heads=3, num_layers=2, d_ff=72),
        cond_dim=40,
        encode_length=128,
        max_length=64,
    ),
    "gated": Source(
        _t5(vocab_size=80, d_model=36, d_kv=8, num_heads=5, num_layers=3, d_ff=56, feed_forward_proj="gated-gelu"),
        cond_dim=28,
        encode_length=32,
        max_length=16,
        numbers=(("seconds_start", 1, 512), ("seconds_total", 0, 512)),
    ),
    "order": Source(
        _t5(vocab_size=64, d_model=20, d_kv=12, num_heads=2, num_layers=1, d_ff=44),
        cond_dim=20,
        encode_length=24,
        max_length=24,
        numbers=(("seconds_total", 1, 48),),
        order=("cos", "sin", "x"),
        frequencies=16,
    ),
    "square": Source(
        _t5(vocab_size=64, d_model=16, d_kv=10, num_heads=2, num_layers=1, d_ff=44),
        cond_dim=16,
        encode_length=24,
        max_length=16,
    ),
}


# the release's sizes
FULL = Source(
    _t5(vocab_size=32128, d_model=768, d_kv=64, num_heads=12, num_layers=12, d_ff=3072),
    cond_dim=768,
    encode_length=128,
    max_length=64,
)


class Conditioners(nn.Module):
    """input_ids and attention_mask (1, encode_length) and numbers (1,) to tokens, their mask and the global vector.

    `half` traces T5 in half precision, as an encoder kept outside the module tree is.
    """

    def __init__(self, source: Source, conditioner: nn.Module, half: bool = False) -> None:
        super().__init__()
        prompt = conditioner.conditioners["prompt"]
        self.t5 = prompt.model.half() if half else prompt.model
        self.projection = prompt.proj_out
        self.source = source
        self.embedders = nn.ModuleList([conditioner.conditioners[id_].embedder for id_, _, _ in source.numbers])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *numbers: torch.Tensor):
        count = self.source.max_length
        states = self.t5(input_ids=input_ids, attention_mask=attention_mask)["last_hidden_state"][:, :count]
        mask = attention_mask[:, :count].float()
        tokens = self.projection(states.float()) * mask.unsqueeze(-1)
        embedded = [
            self._embed((number.clamp(low, high) - low) / (high - low), embedder)
            for number, embedder, (_, low, high) in zip(numbers, self.embedders, self.source.numbers, strict=True)
        ]
        ones = torch.ones(1, len(embedded))
        cross = torch.cat([tokens, *(one.unsqueeze(1) for one in embedded)], 1)
        return cross, torch.cat([mask, ones], 1), torch.cat(embedded, -1)

    def _embed(self, x: torch.Tensor, embedder: nn.Module) -> torch.Tensor:
        if self.source.order == ("x", "sin", "cos"):
            return embedder(x)
        positional, dense = embedder.embedding
        angles = x[:, None] * positional.weights[None] * 2 * math.pi
        features = {"x": x[:, None], "sin": angles.sin(), "cos": angles.cos()}
        return dense(torch.cat([features[name] for name in self.source.order], -1))

    def sample(self) -> tuple[torch.Tensor, ...]:
        """Inputs to trace with."""
        ids = torch.zeros(1, self.source.encode_length, dtype=torch.long)
        ids[0, :5] = torch.tensor([7, 3, 20, 11, 1])
        return (ids, (ids != 0).long(), *(torch.tensor([10.0 + i]) for i in range(len(self.embedders))))
