"""The CUDA kernels beside their plain form: on an NVIDIA GPU as they are, elsewhere their sources through g++."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_audio_native import cuda, cuda_dit
from mlx_audio_native.config import ModelConfig
from mlx_audio_native.dit import DiT, DiTConfig
from mlx_audio_native.releases import SMALL, release_config

CONFIG = DiTConfig(
    io_channels=16,
    embed_dim=128,
    depth=1,
    num_heads=2,
    cond_token_dim=64,
    cond_embed_dim=64,
    global_cond_dim=64,
    ff_dim=192,
    norm_eps=1e-5,
    qk_norm=True,
    objective="v",
    shifts_distribution=False,
)


def random_dit(config: DiTConfig) -> DiT:
    """Weights that float16 holds, gains and shifts that are not 1 and 0."""
    dit, weights = DiT(config), []
    for index, (name, array) in enumerate(tree_flatten(dit.parameters())):
        noise = mx.random.normal(array.shape, key=mx.random.key(index))
        scale = array.shape[-1] ** -0.5 if array.ndim > 1 else 0.1
        weights.append((name, scale * noise + float(name.endswith("norm.weight"))))
    dit.load_weights(weights)
    dit.update(tree_map(lambda array: array.astype(mx.float16).astype(mx.float32), dit.parameters()))
    return dit


def check_dit(config: DiTConfig, batch: int, latents: int, tokens: int) -> None:
    dit = random_dit(config)
    x = mx.random.normal((batch, latents, config.io_channels), key=mx.random.key(1))
    context = mx.random.normal((batch, tokens, config.cond_token_dim), key=mx.random.key(2))
    vector = mx.random.normal((batch, config.global_cond_dim), key=mx.random.key(3))
    t = mx.full((batch,), 0.5)
    expected = np.array(dit(x, t, context, vector))
    dit.update(tree_map(lambda array: array.astype(mx.float16), dit.parameters()))
    dit.compile()
    found = np.array(dit._velocity(x, t, *dit.prepare(context, vector)))
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 2e-3


SINGLE = ["prepare_heads", "attention", "add_norm", "attention", "add_norm", "swiglu"]


@pytest.mark.parametrize("processors", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_few_rows_take_one_kernel(cuda_kernels: list[str], monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    monkeypatch.setattr(cuda, "processors", lambda: processors)
    check_dit(replace(CONFIG, depth=2, ff_dim=512), batch=2, latents=40, tokens=5)
    assert cuda_kernels == ["block", "block", "swiglu"]


def test_many_rows_take_the_library_between_kernels(cuda_kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_dit, "_FEW_ROWS", 0)
    check_dit(replace(CONFIG, depth=2), batch=2, latents=20, tokens=5)
    assert cuda_kernels == [*SINGLE, "add_norm", *SINGLE]


@pytest.mark.slow
def test_many_rows_as_wide_as_the_release(cuda_kernels: list[str]) -> None:
    config = replace(ModelConfig.from_dict(release_config(SMALL)).dit, depth=2)
    check_dit(config, batch=3, latents=256, tokens=65)
    assert cuda_kernels == [*SINGLE, "add_norm", *SINGLE]


def test_what_was_prepared_before_compiling_serves(cuda_kernels: list[str]) -> None:
    dit = random_dit(CONFIG)
    dit.update(tree_map(lambda array: array.astype(mx.float16), dit.parameters()))
    x, t = mx.random.normal((1, 9, CONFIG.io_channels), key=mx.random.key(1)), mx.array([0.5])
    prepared = dit.prepare(mx.random.normal((1, 70, CONFIG.cond_token_dim), key=mx.random.key(2)), mx.ones((1, 64)))
    expected = np.array(dit.velocity(x, t, prepared))
    dit.compile()
    found = np.array(dit._velocity(x, t, *prepared))
    assert cuda_kernels == ["swiglu"]
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 2e-3


@pytest.mark.parametrize("t", [0.5, np.nan])
def test_arrivals_are_zeros_that_do_not_lie_in_memory_of_the_host(t: float) -> None:
    arrivals = cuda_dit.zero_arrivals(mx.array([t]))
    assert arrivals.dtype == mx.uint32 and arrivals.nbytes > 8 and not mx.any(arrivals).item()


@pytest.mark.slow
@pytest.mark.parametrize("processors", [0, 2, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False},
        {"embed_dim": 192, "num_heads": 3, "cond_embed_dim": 64, "depth": 2},
        {"embed_dim": 256, "cond_embed_dim": 128},
        {"embed_dim": 256, "num_heads": 4, "cond_token_dim": 128, "cond_embed_dim": 128},
    ],
)
@pytest.mark.parametrize(("latents", "tokens"), [(63, 64), (64, 65), (130, 1)])
def test_dit_of_other_sizes(
    cuda_kernels: list[str],
    monkeypatch: pytest.MonkeyPatch,
    processors: int,
    changes: dict,
    latents: int,
    tokens: int,
) -> None:
    monkeypatch.setattr(cuda, "processors", lambda: processors)
    config = replace(CONFIG, **changes)
    check_dit(config, batch=1, latents=latents, tokens=tokens)
    many = [*SINGLE, *["add_norm", *SINGLE] * (config.depth - 1)]
    assert cuda_kernels == (["block"] * config.depth + ["swiglu"] if processors else many)
