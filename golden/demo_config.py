"""The demo model's config, in stable-audio-tools' schema with the model folder's additions."""

from __future__ import annotations

from typing import Any

from golden import sounds

LATENTS = 64
CONDITION = 128


def demo_config(vocabulary: int) -> dict[str, Any]:
    """For a tokenizer of so many pieces.

    Sizes are chosen for 24 MB in all, and for seconds on two CPU cores, where the decoder's full-rate level decides: it
    is narrow, and the first stride wide.
    """
    oobleck = {"channels": 16, "c_mults": [4, 8, 12], "strides": [8, 8, 32], "use_snake": True}
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
                    "encoder": {"type": "oobleck", "config": {"in_channels": 2, "latent_dim": 2 * LATENTS, **oobleck}},
                    "decoder": {
                        "type": "oobleck",
                        "config": {"out_channels": 2, "latent_dim": LATENTS, **oobleck, "final_tanh": False},
                    },
                    "bottleneck": {"type": "vae"},
                    "latent_dim": LATENTS,
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
                                "num_layers": 3,
                                "d_ff": 256,
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
                    "io_channels": LATENTS,
                    "embed_dim": 256,
                    "depth": 6,
                    "num_heads": 4,
                    "cond_token_dim": CONDITION,
                    "global_cond_dim": CONDITION,
                    "transformer_type": "continuous_transformer",
                    "attn_kwargs": {"qk_norm": "ln"},
                    "ff_kwargs": {"mult": 2},
                },
            },
            "io_channels": LATENTS,
        },
    }
