"""Text and numbers to tokens, mask and global vector: the formula in float64, crops, padding, order, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_audio_native import cuda
from mlx_audio_native.conditioning import ANGLE_CONSTANTS, Conditioner, NumberConfig, NumberEmbedder, _send
from mlx_audio_native.errors import InputError
from mlx_audio_native.weights import load_parts

finite = st.floats(-1e4, 1e4, width=32)
orders = st.permutations(["x", "sin", "cos"]).flatmap(lambda all_: st.integers(1, 3).map(lambda count: all_[:count]))
numbers = st.builds(
    NumberConfig,
    id=st.just("seconds_total"),
    min=st.floats(-100, 100, width=32),
    max=st.floats(101, 1000, width=32),
    features=orders.map(tuple),
    scale=st.none() | st.floats(-1 / 64, 1 / 64, width=32),
    angle_constants=st.sampled_from([ANGLE_CONSTANTS, (), (6.2831854820251465,), (2.0, 3.140625)]),
)


def define_number(config: NumberConfig, tensors: list[np.ndarray], value: float) -> tuple[np.ndarray, float]:
    """The embedding (D,) in float64 and the largest angle in it."""
    frequencies, weight, bias = (np.array(tensor, np.float64) for tensor in tensors)
    x = np.clip(np.float64(value), config.min, config.max) - config.min
    x = x / (config.max - config.min) if config.scale is None else x * config.scale
    angles = x * frequencies * np.prod(config.angle_constants)
    parts = {"x": np.array([x]), "sin": np.sin(angles), "cos": np.cos(angles)}
    return np.concatenate([parts[name] for name in config.features]) @ weight.T + bias, np.abs(angles).max()


@settings(deadline=None, max_examples=200)
@given(config=numbers, value=finite, frequencies=st.integers(1, 150), dim=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_the_number_embedding_equals_its_formula(config, value, frequencies, dim, seed):
    """Within 1e-6 · (1 + largest angle) · largest row ‖W‖₁."""
    rng = np.random.default_rng(seed)
    shapes = (frequencies,), (dim, config.width(frequencies)), (dim,)
    tensors = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    largest = np.abs(tensors[1]).sum(1).max()
    tensors[2] *= largest  # a bias that outweighs the rest would be rounded by more than the bound
    embedder = NumberEmbedder(config, dim, frequencies)
    embedder.frequencies, embedder.weight, embedder.bias = map(mx.array, tensors)
    found = np.array(embedder(mx.array([value])))[0]
    expected, angle = define_number(config, tensors, value)
    assert np.abs(found - expected).max() <= 1e-6 * (1 + angle) * largest


def two_numbers(config: dict[str, Any]) -> None:
    """As in the 1.0 release: start and total, in that order, in both lists."""
    start = {"id": "seconds_start", "type": "number", "config": {"min_val": 0, "max_val": 512}}
    config["model"]["conditioning"]["configs"].insert(1, start)
    config["model"]["conditioning"]["configs"][0]["config"]["max_length"] = 16
    diffusion = config["model"]["diffusion"]
    diffusion["cross_attention_cond_ids"] = ["prompt", "seconds_start", "seconds_total"]
    diffusion["global_cond_ids"] = ["seconds_start", "seconds_total"]
    diffusion["config"]["global_cond_dim"] = 64


def encode_longer(config: dict[str, Any]) -> None:
    """As in the TFLite exports: more tokens are encoded than come out; and through a dense layer."""
    prompt = config["model"]["conditioning"]["configs"][0]["config"]
    prompt |= {"max_length": 16, "encode_length": 30}
    prompt["t5_config"]["d_model"] = 24


@pytest.fixture(scope="module")
def conditioner(make_folder: Callable[..., Path]) -> Conditioner:
    return load_parts(make_folder(two_numbers), ["conditioner"]).conditioner


@pytest.fixture(scope="module")
def longer(make_folder: Callable[..., Path]) -> Conditioner:
    return load_parts(make_folder(encode_longer), ["conditioner"]).conditioner


def tokens(*lengths: int, width: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return np.random.default_rng(seed).integers(2, 100, mask.shape) * mask, mask


def test_shapes_order_and_dtype(conditioner):
    ids, mask = tokens(5, 16)
    out = conditioner.encode(ids, mask, seconds_start=[1, 2], seconds_total=[30, 31])
    assert (out.cross_attention.shape, out.mask.shape, out.global_cond.shape) == ((2, 18, 32), (2, 18), (2, 64))
    assert {array.dtype for array in out} == {mx.float32}
    start, total = conditioner.numbers["seconds_start"], conditioner.numbers["seconds_total"]
    both = mx.concatenate([start(mx.array([1.0, 2.0])), total(mx.array([30.0, 31.0]))], axis=1)
    assert mx.array_equal(out.global_cond, both)
    assert mx.array_equal(out.cross_attention[:, 16:].flatten(1), both)
    assert out.mask.sum(1).tolist() == [5 + 2, 16 + 2]
    assert mx.abs(out.cross_attention[0, 5:16]).max().item() == 0


def test_anything_that_mx_array_takes(conditioner):
    ids, mask = tokens(4)
    values = {"seconds_start": 0, "seconds_total": 7.5}
    first = conditioner.encode(ids, mask, **values)
    forms = [
        (ids.tolist(), mask.tolist(), values),
        (mx.array(ids), mx.array(mask.astype(bool)), {key: np.array([value]) for key, value in values.items()}),
        (ids.astype(np.int16), mask.astype(np.float32), {key: mx.array([[value]]) for key, value in values.items()}),
        (
            [[mx.array(id_) for id_ in ids[0].tolist()]],
            mx.array(mask, mx.bfloat16),
            {key: mx.array(value, mx.bfloat16) for key, value in values.items()},
        ),
    ]
    for form in forms:
        other = conditioner.encode(*form[:2], **form[2])
        assert all(mx.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (9,), (4, 9), (9, 9, 9)], ids=str)
def test_the_form_for_a_gpu_gives_the_same(conditioner, monkeypatch, as_on_gpu, lengths, on_cuda):
    ids, mask = tokens(*lengths)
    values = {"seconds_start": np.arange(len(lengths)), "seconds_total": 7.5}
    expected = conditioner.encode(ids, mask, **values)
    as_on_gpu()
    monkeypatch.setattr(cuda, "is_default", lambda: on_cuda)
    for a, b in zip(conditioner.encode(ids, mask, **values), expected, strict=True):
        assert mx.abs(a - b).max().item() <= 5e-6 * max(1, mx.abs(b).max().item())


@pytest.mark.parametrize("lengths", [(9,), (4, 9)], ids=str)
def test_what_is_compiled_for_a_gpu_gives_the_same(make_folder, monkeypatch, lengths):
    conditioner = load_parts(make_folder(), ["conditioner"]).conditioner
    ids, mask = tokens(*lengths)
    values = {"seconds_total": np.arange(len(lengths)) + 3.5}
    expected = conditioner.encode(ids, mask, **values)
    mx.eval(expected)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    conditioner.compile()
    for _ in range(2):  # traced, and from what was traced
        for a, b in zip(conditioner.encode(ids, mask, **values), expected, strict=True):
            assert mx.abs(a - b).max().item() <= 5e-6 * max(1, mx.abs(b).max().item())


def test_for_a_gpu_it_is_compiled_once(make_folder, monkeypatch, as_on_gpu):
    conditioner = load_parts(make_folder(), ["conditioner"]).conditioner
    compiled, real = [], mx.compile
    monkeypatch.setattr(mx, "compile", lambda function: compiled.append(function) or real(function))
    as_on_gpu()
    conditioner.compile()
    for length in (4, 9):
        conditioner.encode(*tokens(length), seconds_total=3)
    assert len(compiled) == 1


def test_what_was_compiled_for_a_gpu_is_freed(make_folder, as_on_gpu):
    conditioner = load_parts(make_folder(), ["conditioner"]).conditioner
    as_on_gpu()
    conditioner.compile()
    mx.eval(conditioner.encode(*tokens(4), seconds_total=3))
    gone = ref(conditioner)
    del conditioner
    assert gone() is None


@pytest.mark.parametrize("values", [np.arange(19, dtype=np.uint16), np.arange(3, dtype=np.float32), np.ones(1, bool)])
def test_little_goes_to_an_nvidia_gpu_by_8_bytes_and_much_at_once(monkeypatch, values):
    monkeypatch.setattr(cuda, "is_default", lambda: True)
    pieces = _send(values)
    assert max(piece.nbytes for piece in pieces) <= 8
    assert mx.array_equal(mx.concatenate(pieces), mx.array(values))
    assert [piece.size for piece in _send(np.ones(65, np.float32))] == [65]
    monkeypatch.setattr(cuda, "is_default", lambda: False)
    assert len(_send(values)) == 1


def test_nothing_is_waited_for(conditioner, monkeypatch):
    """On a GPU each evaluation on the way is a wait."""

    def refuse(self: mx.array) -> None:
        raise AssertionError("an MLX array was read")

    ids, mask = tokens(4, 9)
    monkeypatch.setattr(mx.array, "item", refuse)
    monkeypatch.setattr(mx.array, "tolist", refuse)
    monkeypatch.setattr(mx, "eval", refuse)
    conditioner.encode(ids, mask, seconds_start=0, seconds_total=[1, 2])


@given(lengths=st.lists(st.integers(1, 16), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_a_batch_equals_singles(conditioner, lengths, seed):
    ids, mask = tokens(*lengths, seed=seed)
    seconds = np.linspace(0, 600, len(lengths))
    together = conditioner.encode(ids, mask, seconds_start=0, seconds_total=seconds)
    for row in range(len(lengths)):
        alone = conditioner.encode(ids[row][None], mask[row][None], seconds_start=0, seconds_total=seconds[row])
        for found, expected in zip(together, alone, strict=True):
            assert mx.abs(found[row] - expected[0]).max().item() <= 5e-6 * max(1, mx.abs(expected).max().item())


@given(length=st.integers(1, 16), more=st.integers(0, 14))
def test_width_of_the_ids_changes_nothing(longer, length, more):
    narrow = longer.encode(*tokens(length, width=length), seconds_total=3)
    ids, mask = (np.pad(array, ((0, 0), (0, more))) for array in tokens(length, width=length))
    wide = longer.encode(ids, mask, seconds_total=3)
    assert all(mx.array_equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_tokens_beyond_max_length_are_heard_but_cropped(longer):
    """Encoding 30 and cropping to 16 differs from encoding 16: the last tokens attend to those behind them."""
    ids, mask = tokens(30, width=30)
    whole = longer.encode(ids, mask, seconds_total=3)
    cut = longer.encode(ids[:, :16], mask[:, :16], seconds_total=3)
    assert whole.cross_attention.shape == cut.cross_attention.shape == (1, 17, 32)
    assert mx.array_equal(whole.mask, cut.mask)
    assert mx.abs(whole.cross_attention - cut.cross_attention).max().item() > 1e-3


def test_values_beyond_the_range_are_clipped(conditioner):
    ids, mask = tokens(3, 3, 3)
    out = conditioner.encode(ids, mask, seconds_start=[-5, 0, 0], seconds_total=[256, 1e9, 300])
    assert mx.array_equal(out.global_cond[0], out.global_cond[1])
    assert mx.array_equal(out.global_cond[1], out.global_cond[2])


@pytest.mark.parametrize(("ids", "error"), [([[1], [1, 2]], ValueError), (None, TypeError), ("kick", ValueError)])
def test_what_mx_array_refuses_is_refused_as_it_does(conditioner, ids, error):
    with pytest.raises(error) as expected:
        mx.array(ids)
    with pytest.raises(error) as found:
        conditioner.encode(ids, [[1]], seconds_start=0, seconds_total=1)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("ids", "mask", "values", "said"),
    [
        ([[1]], [[1]], {"seconds_total": 1}, "also needs seconds_start"),
        ([[1]], [[1]], {"seconds_start": 0, "seconds_totl": 1}, "did you mean 'seconds_total'"),
        ([[1]], [[1]], {"seconds_start": 0, "seconds_total": float("nan")}, "seconds_total must be finite"),
        ([[1]], [[1]], {"seconds_start": [0, 1], "seconds_total": 1}, "2 values for a batch of 1"),
        ([[100]], [[1]], {}, "from 0 to 99"),
        ([[-1]], [[1]], {}, "from 0 to 99"),
        ([[1.5]], [[1]], {}, "whole numbers, found mlx.core.float32"),
        ([[True]], [[1]], {}, "whole numbers, found mlx.core.bool"),
        ([[2**40]], [[1]], {}, "from 0 to 99"),
        ([[1]], [[1]], {"seconds_start": 0, "seconds_total": 1e300}, "seconds_total must be finite"),
        ([1], [1], {}, "one shape"),
        ([[1, 2]], [[1]], {}, "one shape"),
        ([[1] * 17], [[1] * 17], {}, "up to 16 tokens"),
        ([[]], [[]], {}, "one shape"),
    ],
)
def test_refusals(conditioner, ids, mask, values, said):
    with pytest.raises(InputError, match=said):
        conditioner.encode(ids, mask, **values)
