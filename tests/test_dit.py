"""The diffusion transformer against its definition in float64, read from the tensors by stable-audio-tools' names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlx_audio_native.dense import add_dense
from mlx_audio_native.dit import Attention, DiT, DiTConfig
from mlx_audio_native.quantization import Quantization
from mlx_audio_native.weights import load_parts, read_tensors

VELOCITY_BOUND = 5e-6
NAMES = "model.model."
Tensors = dict[str, np.ndarray]


def norm(x: np.ndarray, gain: np.ndarray, offset: np.ndarray, epsilon: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * gain + offset


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def embed(x: np.ndarray, tensors: Tensors, name: str) -> np.ndarray:
    zero = np.zeros(1)
    x = silu(x @ tensors[f"{name}.0.weight"].T + tensors.get(f"{name}.0.bias", zero))
    return x @ tensors[f"{name}.2.weight"].T + tensors.get(f"{name}.2.bias", zero)


def rotate(x: np.ndarray, dim: int) -> np.ndarray:
    """(T, head) with the first `dim` rotated: each of the first half with its partner in the second.

    The angles are the reference's, float32: at position 1000 they are 1e-4 from the exact ones.
    """
    frequencies = 1 / np.float32(10000) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    angles = (np.arange(len(x), dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    first, second, rest = np.split(x, [dim // 2, dim], axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, tensors: Tensors, name: str, config: DiTConfig, rope: bool):
    """Projected queries (T, E), keys and values (N, K): one head after the other, keys shared by neighbouring heads."""
    size, states = config.head_dim, []
    for head in range(config.num_heads):
        shared = head * (k.shape[1] // size) // config.num_heads
        q_head, k_head = q[:, head * size : (head + 1) * size], k[:, shared * size : (shared + 1) * size]
        if config.qk_norm:
            q_head = norm(q_head, tensors[f"{name}.q_norm.weight"], tensors[f"{name}.q_norm.bias"], 1e-6)
            k_head = norm(k_head, tensors[f"{name}.k_norm.weight"], tensors[f"{name}.k_norm.bias"], 1e-6)
        if rope:
            q_head, k_head = rotate(q_head, config.rotary_dim), rotate(k_head, config.rotary_dim)
        scores = q_head @ k_head.T / np.sqrt(size)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        states.append(weights / weights.sum(-1, keepdims=True) @ v[:, shared * size : (shared + 1) * size])
    return np.concatenate(states, -1) @ tensors[f"{name}.to_out.weight"].T


def define_velocity(tensors: Tensors, config: DiTConfig, x: np.ndarray, t: float, tokens: np.ndarray, glob: np.ndarray):
    """One clip's latents (T, C), time, tokens (N, D) and vector (G,) → velocity. Source: stable-audio-tools 0.0.19."""
    angles = 2 * np.pi * t * tensors["timestep_features.weight"][:, 0]
    time = embed(np.concatenate([np.cos(angles), np.sin(angles)]), tensors, "to_timestep_embed")
    context = embed(tokens, tensors, "to_cond_embed")
    x = x + x @ tensors["preprocess_conv.weight"][:, :, 0].T
    x = x @ tensors["transformer.project_in.weight"].T
    token = embed(glob, tensors, "to_global_embed") + time if config.global_cond_dim else time
    x = np.concatenate([token[None], x])
    for layer in range(config.depth):
        name = f"transformer.layers.{layer}."
        own = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
        normed = norm(x, own["pre_norm.gamma"], own["pre_norm.beta"], config.norm_eps)
        q, k, v = np.split(normed @ own["self_attn.to_qkv.weight"].T, 3, axis=-1)
        x = x + attend(q, k, v, own, "self_attn", config, rope=True)
        normed = norm(x, own["cross_attend_norm.gamma"], own["cross_attend_norm.beta"], config.norm_eps)
        k, v = np.split(context @ own["cross_attn.to_kv.weight"].T, 2, axis=-1)
        x = x + attend(normed @ own["cross_attn.to_q.weight"].T, k, v, own, "cross_attn", config, rope=False)
        normed = norm(x, own["ff_norm.gamma"], own["ff_norm.beta"], config.norm_eps)
        value, gate = np.split(normed @ own["ff.ff.0.proj.weight"].T + own["ff.ff.0.proj.bias"], 2, axis=-1)
        x = x + (value * silu(gate)) @ own["ff.ff.2.weight"].T + own["ff.ff.2.bias"]
    x = x[1:] @ tensors["transformer.project_out.weight"].T
    return x + x @ tensors["postprocess_conv.weight"][:, :, 0].T


QK_NORM = {"attn_kwargs": {"qk_norm": "ln"}}
FEWER_HEADS = {"project_cond_tokens": False, "embed_dim": 128, "num_heads": 4}
VARIANTS = {
    "equal heads": {},
    "q/k norm": QK_NORM,
    "no global conditioning": {"global_cond_dim": 0},
    "fewer key/value heads": FEWER_HEADS,
    "fewer, with norm": {**FEWER_HEADS, **QK_NORM},
    "heads of 96": {"embed_dim": 192, "ff_kwargs": {"mult": 1.5}, "norm_kwargs": {"eps": 0.01}},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, make_folder: Callable[..., Path]) -> tuple[DiT, Tensors]:
    def edit(config: dict[str, Any]) -> None:
        config["model"]["diffusion"]["config"] |= VARIANTS[request.param]

    folder = make_folder(edit)
    tensors = {k.removeprefix(NAMES): np.array(v, np.float64) for k, v in read_tensors(folder, ["dit"]).items()}
    return load_parts(folder, ["dit"], "float32").dit, tensors


def inputs(batch: int, length: int = 40, tokens: int = 9, seed: int = 0) -> list[mx.array]:
    rng = np.random.default_rng(seed)
    shapes = (batch, length, 8), (batch, tokens, 32), (batch, 32)
    return [mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def relative_rms(found: mx.array, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.array(found, np.float64) - expected) ** 2) / np.mean(expected**2)))


def test_velocity_equals_the_definition(model):
    dit, tensors = model
    latents, tokens, global_cond = inputs(4)
    t = mx.array([1.0, 0.7310586, 0.05, 0.0])
    velocity = dit(latents, t, tokens, global_cond)
    assert (velocity.shape, velocity.dtype) == (latents.shape, mx.float32)
    for row in range(4):
        arrays = (np.array(array[row], np.float64) for array in (latents, t, tokens, global_cond))
        expected = define_velocity(tensors, dit.config, *arrays)
        assert relative_rms(velocity[row], expected) <= VELOCITY_BOUND


def test_the_form_for_a_gpu_gives_the_same_and_is_compiled_once(model, monkeypatch, as_on_gpu):
    dit, _ = model
    latents, tokens, global_cond = inputs(2)
    times = mx.array([0.8, 0.8]), mx.array([0.1, 0.5])
    prepared = dit.prepare(tokens, global_cond)
    expected = [np.array(dit.velocity(latents, t, prepared), np.float64) for t in times]
    compiled, real = [], mx.compile
    monkeypatch.setattr(mx, "compile", lambda function: compiled.append(function) or real(function))
    as_on_gpu()
    monkeypatch.setattr(dit, "compiles", True)
    for t, velocity in zip(times, expected, strict=True):
        assert relative_rms(dit.velocity(latents, t, prepared), velocity) <= VELOCITY_BOUND
    assert len(compiled) == 1


@pytest.mark.parametrize("kind", ["plain", "bias", "quantised"])
def test_a_layer_onto_a_sum(kind):
    layer = nn.Linear(64, 32, bias=kind == "bias")
    if kind == "quantised":
        layer = layer.to_quantized(32, 8)
    x, residual = mx.random.normal((10, 64)), mx.random.normal((10, 32))
    assert relative_rms(add_dense(residual, layer, x), np.array(residual + layer(x), np.float64)) <= 1e-6


def test_quantised_blocks_equal_the_blocks_of_their_weights(small_folder: Path):
    dit = load_parts(small_folder, ["dit"], "float32").dit
    arrays, t = inputs(2), mx.array([0.6, 0.3])
    Quantization(8, 32).apply("dit", dit)
    found = dit(arrays[0], t, *arrays[1:])
    layers = [(path, layer) for path, layer in dit.named_modules() if isinstance(layer, nn.QuantizedLinear)]
    assert len(layers) == 7 * len(dit.blocks)
    for path, layer in layers:
        weight = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in layer)
        plain.update({"weight": weight} | ({"bias": layer.bias} if "bias" in layer else {}))
        dit.update_modules(tree_unflatten([(path, plain)]))
    assert not any(isinstance(layer, nn.QuantizedLinear) for _, layer in dit.named_modules())
    assert relative_rms(found, np.array(dit(arrays[0], t, *arrays[1:]), np.float64)) <= VELOCITY_BOUND


def test_what_is_prepared_serves_every_step(model):
    dit, _ = model
    latents, tokens, global_cond = inputs(2)
    prepared = dit.prepare(tokens, global_cond)
    for t in (mx.array([0.9, 0.9]), mx.array([0.1, 0.4])):
        assert mx.array_equal(dit.velocity(latents, t, prepared), dit(latents, t, tokens, global_cond))


def test_a_batch_equals_singles(model):
    dit, _ = model
    arrays, t = inputs(3), mx.array([0.9, 0.5, 0.1])
    together = dit(arrays[0], t, *arrays[1:])
    for row in range(3):
        alone = dit(arrays[0][row][None], t[row][None], *(array[row][None] for array in arrays[1:]))
        assert relative_rms(together[row], np.array(alone[0], np.float64)) <= VELOCITY_BOUND


def test_every_token_counts_the_zero_ones_too(model):
    """The reference drops masks: padding's zero rows are keys like any other."""
    dit, _ = model
    latents, tokens, global_cond = inputs(1)
    t = mx.array([0.5])
    padded = mx.pad(tokens, ((0, 0), (0, 5), (0, 0)))
    change = dit(latents, t, padded, global_cond) - dit(latents, t, tokens, global_cond)
    assert mx.abs(change).max().item() > 1e-3


def test_rotation_keeps_the_references_angles_far_out(model):
    """1025 positions, as in the 1.0 release; angles from a base instead of float32 periods are 1e-4 off there."""
    dit, _ = model
    size = dit.config.head_dim
    x = np.random.default_rng(0).standard_normal((1025, size)).astype(np.float32)
    found = np.array(dit.blocks[0].self_attention.rotate(mx.array(x)[None, None]))[0, 0]
    assert np.abs(found - rotate(x.astype(np.float64), dit.config.rotary_dim)).max() <= 2e-6


def test_the_norm_of_queries_and_keys_stands_small_values():
    """Its epsilon is 1e-6, not the other norms' 1e-5: with a variance near that, the two differ by a factor."""
    attention = Attention(DiTConfig(8, 64, 1, 2, 32, 64, 32, 256, 1e-5, True, "v", False))
    x = 1e-3 * np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    expected = norm(x.astype(np.float64), np.ones(32), np.zeros(32), 1e-6)
    for layer in (attention.q_norm, attention.k_norm):
        assert relative_rms(layer(mx.array(x)), expected) <= VELOCITY_BOUND


def test_half_precision_keeps_the_latents_dtype_and_the_frequencies(small_folder: Path):
    half = load_parts(small_folder, ["dit"], "float16").dit
    whole = load_parts(small_folder, ["dit"], "float32").dit
    arrays, t = inputs(1), mx.array([0.6])
    found, expected = half(arrays[0], t, *arrays[1:]), whole(arrays[0], t, *arrays[1:])
    assert half.project_in.weight.dtype == mx.float16
    assert found.dtype == mx.float32
    assert mx.array_equal(half.timestep_frequencies, whole.timestep_frequencies)
    assert relative_rms(found, np.array(expected, np.float64)) <= 0.01
