"""The demo model's config, in stable-audio-tools' schema with the model folder's additions."""

from __future__ import annotations

from typing import Any

from golden import sounds

LATENTS = 64
CONDITION = 128


def demo_config(
    channels: int = 16,
    c_mults: tuple[int, ...] = (4, 8, 12),
    strides: tuple[int, ...] = (8, 8, 32),
    latents: int = LATENTS,
    vocabulary: int = 160,
) -> dict[str, Any]:
    """Sizes are chosen so that a clip takes seconds on two CPU cores: the decoder's full-rate level is kept narrow."""
    oobleck = {"channels": channels, "c_mults": list(c_mults), "strides": list(strides), "use_snake": True}
    return {
        "model_type": "diffusion_cond",
        "sample_size": sounds.WINDOW,
        "sample_rate": sounds.SAMPLE_RATE,
        "audio_channels": 2,
        "model": {
            "pretransform": {
                "type": "autoencoder",
                "iterate_batch": True,
                "config": {
                    "encoder": {"type": "oobleck", "config": {"in_channels": 2, "latent_dim": 2 * latents, **oobleck}},
                    "decoder": {
                        "type": "oobleck",
                        "config": {"out_channels": 2, "latent_dim": latents, **oobleck, "final_tanh": False},
                    },
                    "bottleneck": {"type": "vae"},
                    "latent_dim": latents,
                    "downsampling_ratio": sounds.HOP,
                    "io_channels": 2,
                },
                "scale": 1.0,
            },
            "conditioning": {
                "configs": [
                    {
                        "id": "prompt",
                        "type": "t5",
                        "config": {
                            "t5_model_name": "t5-base",
                            "max_length": 64,
                            "t5_config": {
                                "vocab_size": vocabulary,
                                "d_model": CONDITION,
                                "d_kv": 32,
                                "num_heads": 4,
                                "num_layers": 4,
                                "d_ff": 384,
                                "feed_forward_proj": "relu",
                                "dropout_rate": 0.0,
                            },
                        },
                    },
                    {"id": "seconds_total", "type": "number", "config": {"min_val": 0, "max_val": 256}},
                ],
                "cond_dim": CONDITION,
            },
            "diffusion": {
                "cross_attention_cond_ids": ["prompt", "seconds_total"],
                "global_cond_ids": ["seconds_total"],
                "diffusion_objective": "rf_denoiser",
                "type": "dit",
                "config": {
                    "io_channels": latents,
                    "embed_dim": 256,
                    "depth": 6,
                    "num_heads": 4,
                    "cond_token_dim": CONDITION,
                    "global_cond_dim": CONDITION,
                    "transformer_type": "continuous_transformer",
                    "attn_kwargs": {"qk_norm": "ln"},
                },
            },
            "io_channels": latents,
        },
    }
