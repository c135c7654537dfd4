"""The configs of the published models, by name: what to build where only their sizes matter."""

from __future__ import annotations

from typing import Any

SMALL, OPEN_1_0 = "stable-audio-open-small", "stable-audio-open-1.0"
_OOBLECK = {"channels": 128, "c_mults": [1, 2, 4, 8, 16], "strides": [2, 4, 4, 8, 8], "use_snake": True}
# T5-base, which the checkpoints name and do not hold
_T5 = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "num_heads": 12, "num_layers": 12, "d_ff": 3072}


def _config(sample_size: int, max_length: int, numbers: list[str], max_val: int, diffusion: dict[str, Any]):
    return {
        "model_type": "diffusion_cond",
        "sample_size": sample_size,
        "sample_rate": 44100,
        "audio_channels": 2,
        "model": {
            "pretransform": {
                "type": "autoencoder",
                "iterate_batch": True,
                "config": {
                    "encoder": {"type": "oobleck", "config": {"in_channels": 2, "latent_dim": 128, **_OOBLECK}},
                    "decoder": {
                        "type": "oobleck",
                        "config": {"out_channels": 2, "latent_dim": 64, **_OOBLECK, "final_tanh": False},
                    },
                    "bottleneck": {"type": "vae"},
                    "latent_dim": 64,
                    "downsampling_ratio": 2048,
                    "io_channels": 2,
                },
            },
            "conditioning": {
                "configs": [
                    {
                        "id": "prompt",
                        "type": "t5",
                        "config": {"t5_model_name": "t5-base", "max_length": max_length, "t5_config": dict(_T5)},
                    },
                    *({"id": id_, "type": "number", "config": {"min_val": 0, "max_val": max_val}} for id_ in numbers),
                ],
                "cond_dim": 768,
            },
            "diffusion": {
                "cross_attention_cond_ids": ["prompt", *numbers],
                "global_cond_ids": numbers,
                "type": "dit",
                **diffusion,
            },
            "io_channels": 64,
        },
    }


def release_config(name: str) -> dict[str, Any]:
    """A new copy of the model config of SMALL or OPEN_1_0, in stable-audio-tools' schema; the T5 is spelled out."""
    dit = {"io_channels": 64, "cond_token_dim": 768, "transformer_type": "continuous_transformer"}
    if name == SMALL:
        dit |= {"embed_dim": 1024, "depth": 16, "num_heads": 8, "global_cond_dim": 768}
        dit |= {"attn_kwargs": {"qk_norm": "ln"}}
        diffusion = {"diffusion_objective": "rf_denoiser", "config": dit}
        return _config(524288, 64, ["seconds_total"], 256, diffusion)
    if name == OPEN_1_0:
        dit |= {"embed_dim": 1536, "depth": 24, "num_heads": 24, "global_cond_dim": 1536, "project_cond_tokens": False}
        return _config(
            2097152, 128, ["seconds_start", "seconds_total"], 512, {"diffusion_objective": "v", "config": dit}
        )
    raise KeyError(name)
