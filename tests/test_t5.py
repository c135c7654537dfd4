"""The text encoder against its definition in float64, read from the tensors by their Hugging Face names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_audio_native.t5 import T5Config, T5Encoder, relative_buckets
from mlx_audio_native.weights import load_parts, read_tensors

TEXT_BOUND = 5e-6
NAMES = "conditioner.conditioners.prompt.model."


def define_t5(tensors: dict[str, np.ndarray], config: T5Config, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One row of ids and mask → states. Source: Raffel et al. 2020, and transformers' modeling_t5.py."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon) * tensors[f"{name}.weight"]

    table = tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = table[relative_buckets(len(ids), config.num_buckets, config.max_distance)]
    x = tensors["shared.weight"][ids]
    for block in range(config.num_layers):
        name = f"encoder.block.{block}.layer."
        normed = norm(x, f"{name}0.layer_norm")
        q, k, v = (normed @ tensors[f"{name}0.SelfAttention.{part}.weight"].T for part in "qkv")
        heads = []
        for head in range(config.num_heads):
            columns = slice(head * config.d_kv, (head + 1) * config.d_kv)
            scores = q[:, columns] @ k[:, columns].T + bias[:, :, head]
            weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, columns])
        x = x + np.concatenate(heads, -1) @ tensors[f"{name}0.SelfAttention.o.weight"].T
        normed = norm(x, f"{name}1.layer_norm")
        name += "1.DenseReluDense."
        if config.gated:
            gate = normed @ tensors[f"{name}wi_0.weight"].T
            gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            hidden = gelu * (normed @ tensors[f"{name}wi_1.weight"].T)
        else:
            hidden = np.maximum(normed @ tensors[f"{name}wi.weight"].T, 0)
        x = x + hidden @ tensors[f"{name}wo.weight"].T
    return norm(x, "encoder.final_layer_norm")


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def encoder(
    request: pytest.FixtureRequest, make_folder: Callable[..., Path]
) -> tuple[T5Encoder, dict[str, np.ndarray]]:
    def edit(config: dict[str, Any]) -> None:
        t5 = config["model"]["conditioning"]["configs"][0]["config"]["t5_config"]
        t5 |= {"feed_forward_proj": request.param, "relative_attention_max_distance": 20, "d_kv": 12}

    folder = make_folder(edit)
    tensors = read_tensors(folder, ["conditioner"])
    tensors = {k.removeprefix(NAMES): np.array(v, np.float64) for k, v in tensors.items() if k.startswith(NAMES)}
    return load_parts(folder, ["conditioner"]).conditioner.t5, tensors


def test_states_equal_the_definition(encoder):
    t5, tensors = encoder
    rng = np.random.default_rng(0)
    ids = rng.integers(0, t5.config.vocab_size, (3, 40))
    mask = (np.arange(40) < np.array([[40], [17], [1]])).astype(int)
    states = np.array(t5(mx.array(ids), mx.array(mask)))
    for row in range(3):
        expected = define_t5(tensors, t5.config, ids[row], mask[row])
        real = mask[row] == 1
        error = np.abs(states[row][real] - expected[real]).max()
        assert error <= TEXT_BOUND * max(1, np.abs(expected[real]).max())


def test_the_form_for_a_gpu_gives_the_same(encoder, as_on_gpu):
    t5, _ = encoder
    ids = mx.array(np.random.default_rng(1).integers(0, t5.config.vocab_size, (2, 9)))
    mask = mx.arange(9) < mx.array([[9], [4]])
    expected = t5(ids, mask)
    mx.eval(expected)
    as_on_gpu()
    assert mx.abs(t5(ids, mask) - expected).max().item() <= TEXT_BOUND * max(1, mx.abs(expected).max().item())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_as_a_kernel_gives_the_same(make_folder, as_on_gpu, cuda_kernels, masked):
    t5 = load_parts(make_folder(), ["conditioner"]).conditioner.t5
    ids = np.random.default_rng(3).integers(0, t5.config.vocab_size, (3, 130))
    given = []
    longest = 128 if masked else 40  # the kernel's, or one that is quick
    for length, used in ((1, 1), (9, 1), (longest, 1), (130, 0)):
        real = np.arange(length) < np.array([[length], [length // 2], [0]])
        given.append((mx.array(ids[:, :length]), mx.array(real) if masked else None, used))
    expected = [t5(*each) for *each, _ in given]
    mx.eval(expected)
    as_on_gpu()
    t5.compile()
    for (*each, used), states in zip(given, expected, strict=True):
        cuda_kernels.clear()
        found = t5(*each)
        assert mx.abs(found - states).max().item() <= TEXT_BOUND * max(1, mx.abs(states).max().item())
        assert cuda_kernels == ["t5_attention"] * used * t5.config.num_layers


@pytest.mark.parametrize("on_gpu", [False, True])
def test_without_a_mask_every_token_is_real(encoder, as_on_gpu, on_gpu):
    t5, _ = encoder
    ids = mx.array(np.random.default_rng(2).integers(0, t5.config.vocab_size, (2, 9)))
    if on_gpu:
        as_on_gpu()
    assert mx.array_equal(t5(ids), t5(ids, mx.ones_like(ids)))


def draw(t5: T5Encoder, seed: int) -> list[tuple[str, mx.array]]:
    shapes = [(name, array.shape) for name, array in tree_flatten(t5.parameters())]
    return [(name, mx.random.normal(shape, key=mx.random.key(seed)) / 16) for name, shape in shapes]


def test_weights_that_are_joined_on_a_gpu_stay_parameters_and_are_joined_anew(as_on_gpu):
    config, ids = T5Config(100, 32, 16, 48, 2, 2, False), mx.array([[5, 6, 7]])
    t5 = T5Encoder(config)
    weights = [draw(t5, seed) for seed in (0, 1)]
    expected = [T5Encoder(config).load_weights(each)(ids) for each in weights]
    mx.eval(expected)
    as_on_gpu()
    for each, states in zip(weights, expected, strict=True):
        found = t5.load_weights(each)(ids)
        assert mx.abs(found - states).max().item() <= TEXT_BOUND * max(1, mx.abs(states).max().item())
        held = dict(tree_flatten(t5.parameters()))
        assert held.keys() == dict(each).keys()
        assert all(mx.array_equal(held[name], array) for name, array in each)


def test_weights_that_are_joined_on_a_gpu_take_no_more_memory(as_on_gpu):
    t5 = T5Encoder(T5Config(100, 256, 64, 64, 2, 4, False))
    t5.load_weights(draw(t5, 0))
    mx.eval(t5.parameters())
    before = mx.get_active_memory()
    as_on_gpu()
    mx.eval(t5(mx.array([[5, 6, 7]])))
    assert mx.get_active_memory() - before < t5.blocks[0].attention.key.weight.nbytes


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_quantised_blocks_equal_the_blocks_of_their_weights(gated, on_gpu, as_on_gpu):
    if on_gpu:
        as_on_gpu()
    t5 = T5Encoder(T5Config(100, 64, 32, 96, 2, 2, gated))
    ids, mask = mx.array([[5, 6, 7]]), mx.ones((1, 3))
    nn.quantize(t5, 32, 8, class_predicate=lambda path, _: path.startswith("blocks.") and "norm" not in path)
    found = t5(ids, mask)
    layers = [(path, layer) for path, layer in t5.named_modules() if isinstance(layer, nn.QuantizedLinear)]
    assert len(layers) == (7 if gated else 6) * len(t5.blocks)
    for path, layer in layers:
        weight = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = weight
        t5.update_modules(tree_unflatten([(path, plain)]))
    expected = t5(ids, mask)
    assert mx.abs(found - expected).max().item() <= TEXT_BOUND * max(1, mx.abs(expected).max().item())


@given(length=st.integers(1, 12), padding=st.integers(0, 30), filler=st.integers(0, 99), seed=st.integers(0, 99))
def test_padding_never_changes_the_tokens_states(encoder, length, padding, filler, seed):
    t5, _ = encoder
    ids = np.random.default_rng(seed).integers(0, 100, (1, length))
    alone = np.array(t5(mx.array(ids), mx.ones_like(mx.array(ids))))
    padded = np.pad(ids, ((0, 0), (0, padding)), constant_values=filler)
    mask = np.arange(length + padding)[None] < length
    among = np.array(t5(mx.array(padded), mx.array(mask)))[:, :length]
    assert np.abs(among - alone).max() <= TEXT_BOUND * max(1, np.abs(alone).max())


def test_a_row_without_any_token_stays_finite(encoder):
    t5, _ = encoder
    states = t5(mx.array([[3, 4, 5]]), mx.zeros((1, 3)))
    assert mx.isfinite(states).all().item()


def test_buckets_near_and_far():
    """32 buckets: 16 a direction, 8 of them single distances, 8 growing up to 128."""
    buckets = relative_buckets(300, 32, 128)
    assert buckets[10, :11].tolist() == [8, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert buckets[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    starts = [int(np.argmax(buckets[0] == 16 + bucket)) for bucket in range(8, 16)]
    assert starts == [int(np.ceil(8 * 16 ** (step / 8))) for step in range(8)]
    assert buckets[0, 128:].tolist() == [31] * 172
    assert buckets[299, 0] == 15


@given(st.integers(2, 80), st.integers(4, 64), st.integers(33, 400))
def test_buckets_depend_on_the_distance_alone(length, num_buckets, max_distance):
    buckets = relative_buckets(length, num_buckets, max_distance)
    assert buckets.min() >= 0
    assert buckets.max() < num_buckets
    assert (buckets[1:, 1:] == buckets[:-1, :-1]).all()
    assert (np.diff(buckets[0, 1:]) >= 0).all()
