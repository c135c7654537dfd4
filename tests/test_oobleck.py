"""The autoencoder: each convolution against its definition, both directions against theirs in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_audio_native.config import ModelConfig, read_config_json
from mlx_audio_native.convolution import Conv, Downsample, Upsample, convolve_by_phases, upsampling_taps
from mlx_audio_native.errors import InputError, WeightsError
from mlx_audio_native.oobleck import _HANDED_OVER, _LARGEST, Autoencoder, AutoencoderConfig, OobleckConfig
from mlx_audio_native.releases import SMALL, release_config
from mlx_audio_native.weights import load_parts, read_tensors, save

BOUND = 1e-5
NAMES = "pretransform.model."
Tensors = dict[str, np.ndarray]


def define_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, padding: int, dilation: int):
    """(T, in) by torch's kernel (out, in, k), frame by frame."""
    x = np.pad(x, ((padding, padding), (0, 0)))
    reach = dilation * (weight.shape[2] - 1)
    starts = range(0, len(x) - reach, stride)
    frames = [np.einsum("ki,oik->o", x[start : start + reach + 1 : dilation], weight) + bias for start in starts]
    return np.array(frames).reshape(-1, len(weight))


def define_transposed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, padding: int):
    """(T, in) by torch's kernel (in, out, k): every frame adds its kernel, `stride` apart."""
    size = weight.shape[2]
    y = np.zeros(((len(x) - 1) * stride + size, weight.shape[1]))
    for index, frame in enumerate(x):
        y[index * stride : index * stride + size] += np.einsum("i,iok->ko", frame, weight)
    return y[padding : len(y) - padding] + bias


def ceil_half(stride: int) -> int:
    return (stride + 1) // 2


def close(found: mx.array, expected: np.ndarray, least: float = 0.0) -> bool:
    """Relative rms; `least` is what the expected rms counts as where terms of the size of 1 may cancel."""
    found = np.array(found, np.float64)
    if found.shape != expected.shape:
        return False
    off, size = (np.sqrt((array**2).mean()) for array in (found - expected, expected))
    return off <= BOUND * max(size, least)


sizes = {"inputs": st.integers(1, 5), "outputs": st.integers(1, 5), "seed": st.integers(0, 2**32)}


def normal(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@given(length=st.integers(1, 30), stride=st.integers(1, 11), batch=st.integers(1, 3), **sizes)
def test_upsampling_equals_the_transposed_convolution(length, stride, batch, inputs, outputs, seed):
    x, kernel, bias = normal(seed, (batch, length, inputs), (inputs, outputs, 2 * stride), (outputs,))
    layer = Upsample(inputs, outputs, stride)
    layer.weight, layer.bias = upsampling_taps(mx.array(kernel)), mx.array(bias)
    y = layer(mx.array(x))
    assert y.shape == (batch, length * stride - stride % 2, outputs)
    for row in range(batch):
        expected = define_transposed(x[row].astype(np.float64), kernel, bias, stride, ceil_half(stride))
        assert expected.size == 0 or close(y[row], expected, 0.1)


@given(blocks=st.integers(2, 12), more=st.integers(0, 10), stride=st.integers(1, 11), **sizes)
def test_downsampling_equals_the_strided_convolution(blocks, more, stride, inputs, outputs, seed):
    length = blocks * stride + more
    x, kernel, bias = normal(seed, (1, length, inputs), (outputs, inputs, 2 * stride), (outputs,))
    layer = Downsample(inputs, outputs, stride)
    layer.weight = mx.array(kernel).transpose(0, 2, 1).reshape(outputs, 2, stride * inputs)
    layer.bias = mx.array(bias)
    expected = define_conv(x[0].astype(np.float64), kernel, bias, stride, ceil_half(stride), 1)
    assert close(layer(mx.array(x))[0], expected, 0.1)


@given(length=st.integers(1, 60), kernel=st.sampled_from([1, 3, 7]), dilation=st.sampled_from([1, 3, 9]), **sizes)
def test_dilated_convolution_keeps_the_length(length, kernel, dilation, inputs, outputs, seed):
    x, weight, bias = normal(seed, (1, length, inputs), (outputs, inputs, kernel), (outputs,))
    layer = Conv(inputs, outputs, kernel, dilation)
    layer.weight, layer.bias = mx.array(weight).transpose(0, 2, 1), mx.array(bias)
    padding = dilation * (kernel // 2)
    expected = define_conv(x[0].astype(np.float64), weight, bias, 1, padding, dilation)
    assert close(layer(mx.array(x))[0], expected, 0.1)


@given(
    frames=st.integers(1, 60), kernel=st.sampled_from([1, 3, 7]), dilation=st.integers(1, 9), batch=st.just(2), **sizes
)
def test_a_convolution_by_phases_equals_the_dilated_one(frames, kernel, dilation, batch, inputs, outputs, seed):
    x, weight = map(mx.array, normal(seed, (batch, frames, inputs), (outputs, kernel, inputs)))
    padding = dilation * (kernel // 2)
    expected = np.array(mx.conv1d(x, weight, padding=padding, dilation=dilation), np.float64)
    assert close(convolve_by_phases(x, weight, dilation, padding), expected, 0.1)


def define_coder(x: np.ndarray, tensors: Tensors, config: OobleckConfig, decoding: bool) -> np.ndarray:
    """(T, in) → (T', out), as the reference stacks its layers. Source: OobleckEncoder and OobleckDecoder, 0.0.19."""

    def activate(x: np.ndarray, name: str) -> np.ndarray:
        if not config.use_snake:
            return np.where(x > 0, x, np.expm1(x))
        alpha, beta = np.exp(tensors[f"{name}.alpha"]), np.exp(tensors[f"{name}.beta"])
        return x + np.sin(alpha * x) ** 2 / (beta + 1e-9)

    def conv(x: np.ndarray, name: str, stride: int = 1, padding: int = 0, dilation: int = 1) -> np.ndarray:
        bias = tensors.get(f"{name}.bias", np.zeros(1))
        return define_conv(x, tensors[f"{name}.weight"], bias, stride, padding, dilation)

    def unit(x: np.ndarray, name: str, dilation: int) -> np.ndarray:
        y = conv(activate(x, f"{name}.layers.0"), f"{name}.layers.1", padding=3 * dilation, dilation=dilation)
        return x + conv(activate(y, f"{name}.layers.2"), f"{name}.layers.3")

    x = conv(x, "layers.0", padding=3)
    strides = config.strides[::-1] if decoding else config.strides
    for block, stride in enumerate(strides, 1):
        name = f"layers.{block}.layers"
        if decoding:
            x, up = activate(x, f"{name}.0"), f"{name}.1"
            x = define_transposed(x, tensors[f"{up}.weight"], tensors[f"{up}.bias"], stride, ceil_half(stride))
            for index, dilation in enumerate((1, 3, 9), 2):
                x = unit(x, f"{name}.{index}", dilation)
        else:
            for index, dilation in enumerate((1, 3, 9)):
                x = unit(x, f"{name}.{index}", dilation)
            x = conv(activate(x, f"{name}.3"), f"{name}.4", stride, ceil_half(stride))
    last = len(strides) + 1
    x = conv(activate(x, f"layers.{last}"), f"layers.{last + 1}", padding=3 if decoding else 1)
    return np.tanh(x) if config.final_tanh else x


def coders(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of a model config: `changes` for encoder and decoder, some for one alone."""

    def edit(config: dict[str, Any]) -> None:
        pretransform = config["model"]["pretransform"]
        pretransform["scale"] = changes.pop("scale", 1.0)
        section = pretransform["config"]
        section["decoder"]["config"]["final_tanh"] = changes.pop("final_tanh", False)
        section["decoder"]["soft_clip"] = changes.pop("soft_clip", False)
        for name in ("encoder", "decoder"):
            section[name]["config"] |= changes
        section["downsampling_ratio"] = int(np.prod(section["decoder"]["config"]["strides"]))

    return edit


VARIANTS = {
    "snake": {},
    "ELU and tanh": {"use_snake": False, "final_tanh": True},
    "odd strides": {"strides": [3, 5], "scale": 1.7},
    "three levels, soft clip": {"strides": [2, 1, 7], "c_mults": [1, 3, 2], "soft_clip": True},
}


def tame(folder: Path) -> tuple[Path, Tensors]:
    """An autoencoder with smaller weights: on loud signals the snake amplifies rounding a thousandfold."""
    tensors = {name: 0.5 * tensor for name, tensor in read_tensors(folder, ["autoencoder"]).items()}
    tamed = folder.with_name("tame")
    save(tamed, read_config_json(folder), tensors, overwrite=True)
    return tamed, {name.removeprefix(NAMES): np.array(tensor, np.float64) for name, tensor in tensors.items()}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, make_folder: Callable[..., Path]) -> tuple[Autoencoder, Tensors]:
    folder, tensors = tame(make_folder(coders(**VARIANTS[request.param])))
    return load_parts(folder, ["autoencoder"], "float32").autoencoder, tensors


@pytest.mark.parametrize("cuda", [False, True])
def test_convolutions_of_other_devices_give_the_same(model, monkeypatch, as_on_gpu, cuda):
    """Off the CPU mx.conv1d does the work, or with CUDA mx.conv2d by phases.

    Here both run on the CPU all the same.
    """
    autoencoder, _ = model
    latents, audio = normal(3, (2, 5, 8), (2, 4 * autoencoder.config.downsampling_ratio, 2))
    runs = [(autoencoder.decode(mx.array(latents)), autoencoder.encode(mx.array(audio)))]
    as_on_gpu()
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr("mlx_audio_native.convolution._BY_PHASES", 1)
    monkeypatch.setattr("mlx_audio_native.cuda.is_default", lambda: False)
    monkeypatch.setattr(autoencoder, "compiles", True)
    runs.append((autoencoder.decode(mx.array(latents)), autoencoder.encode(mx.array(audio))))
    for products, convolutions in zip(*runs, strict=True):
        assert close(convolutions, np.array(products, np.float64))


def of(tensors: Tensors, coder: str) -> Tensors:
    return {name.removeprefix(f"{coder}."): array for name, array in tensors.items() if name.startswith(coder)}


def test_decoding_equals_the_definition(model):
    autoencoder, tensors = model
    config = autoencoder.config
    (latents,) = normal(0, (2, 9, 8))
    audio = autoencoder.decode(mx.array(latents))
    assert audio.shape == (2, config.decoded_frames(9), 2)
    for row in range(2):
        scaled = latents[row].astype(np.float64) * config.scale
        expected = define_coder(scaled, of(tensors, "decoder"), config.decoder, decoding=True)
        assert close(audio[row], np.tanh(expected) if config.soft_clip else expected)


def test_encoding_equals_the_definition(model):
    autoencoder, tensors = model
    config = autoencoder.config
    (audio,) = normal(1, (2, 7 * config.downsampling_ratio, 2))
    latents = autoencoder.encode(mx.array(audio))
    assert (latents.shape, latents.dtype) == ((2, 7, 8), mx.float32)
    for row in range(2):
        expected = define_coder(audio[row].astype(np.float64), of(tensors, "encoder"), config.encoder, False)
        assert close(latents[row], expected[:, :8] / config.scale)


def test_a_draw_of_the_latents(model):
    """With a key: mean + (softplus(scale) + 1e-4) · noise, the same for the same key."""
    autoencoder, _ = model
    config = autoencoder.config
    audio = mx.array(normal(1, (1, 64 * config.downsampling_ratio, 2))[0])
    mean, scale = mx.split(autoencoder.encoder(audio), 2, axis=-1)
    drawn = [autoencoder.encode(audio, mx.random.key(seed)) * config.scale for seed in (0, 0, 1)]
    assert mx.array_equal(drawn[0], drawn[1])
    assert not mx.array_equal(drawn[0], drawn[2])
    noise = np.array((drawn[0] - mean) / (mx.logaddexp(scale, 0) + 1e-4))
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - 1) < 0.2


@given(frames=st.integers(1, 200))
def test_latents_for_so_many_frames_are_enough(model, frames):
    """What `latents_for` leaves out changes none of the frames: an unbounded value there is not heard."""
    autoencoder, _ = model
    needed = autoencoder.config.latents_for(frames)
    latents = mx.array(normal(2, (1, needed + 4, 8))[0])
    frames = min(frames, autoencoder.config.decoded_frames(needed))
    whole = autoencoder.decode(latents)[:, :frames]
    short = autoencoder.decode(latents[:, :needed])[:, :frames]
    assert mx.abs(whole - short).max().item() <= BOUND * max(1, mx.abs(whole).max().item())


@settings(max_examples=30)
@given(latents=st.integers(1, 70), at_once=st.integers(1, 40))
def test_chunks_decode_to_the_whole(model, latents, at_once):
    """Also with odd strides, which lose frames at the end."""
    autoencoder, _ = model
    config = autoencoder.config
    x = mx.array(normal(4, (2, latents, 8))[0])
    whole = autoencoder.decode(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_audio_native.oobleck._AT_ONCE", at_once * config.downsampling_ratio)
        lengths = {piece.stop - piece.start for piece, _ in config.chunks(latents)}
        found = autoencoder.decode(x)
    assert len(lengths) == 1
    assert close(found, np.array(whole, np.float64))


def test_the_small_release_decodes_its_window_whole_and_long_ones_in_chunks_no_longer():
    config = ModelConfig.from_dict(release_config(SMALL), ["autoencoder"]).autoencoder
    assert config.at_once == 256
    for latents in (257, 400, 1024):
        assert all(piece.stop - piece.start <= 256 for piece, _ in config.chunks(latents))
    assert sum(piece.stop - piece.start for piece, _ in config.chunks(1024)) < 1.1 * 1024


def test_groups_of_a_batch_decode_to_the_whole(model, monkeypatch):
    """Groups as even as they can be, of clips whose largest array is within the bound."""
    autoencoder, _ = model
    latents = mx.array(normal(5, (7, 5, 8))[0])
    whole = autoencoder.decode(latents)
    sizes, decode = [], autoencoder._states
    monkeypatch.setattr(autoencoder, "_states", lambda part: sizes.append(len(part)) or decode(part))
    for most, expected in ((7, [7]), (6, [4, 3]), (3, [3, 3, 1]), (1, [1] * 7), (0.5, [1] * 7)):
        bound = int(most * 4 * autoencoder.config.largest(5))
        monkeypatch.setattr("mlx_audio_native.oobleck._LARGEST", bound)
        sizes.clear()
        assert close(autoencoder.decode(latents), np.array(whole, np.float64))
        assert sizes == expected


@pytest.fixture
def handed_over(monkeypatch) -> list[list[ref]]:
    """The arrays of each mx.async_eval, by weak references; it is asked for at _HANDED_OVER bytes, however few."""
    monkeypatch.setattr(AutoencoderConfig, "largest", lambda *_: 1)
    found, evaluate = [], mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda state: found.append([*map(ref, state)]) or evaluate(state))
    return found


@pytest.mark.parametrize("on_gpu", [False, True])
def test_pieces_decode_to_the_whole(model, monkeypatch, as_on_gpu, handed_over, on_gpu):
    """To the last bit: whether all are evaluated at once, some at a time or each by itself."""
    autoencoder, _ = model
    if on_gpu:
        as_on_gpu()
        monkeypatch.setattr(autoencoder, "compiles", True)
    latents = mx.array(normal(6, (2, 5, 8))[0])
    whole, sizes = autoencoder.decode_whole(latents), []
    stages = len(autoencoder.config.decoder.strides)
    for bound in (2**40, 2**13, 1):
        monkeypatch.setattr("mlx_audio_native.oobleck._HANDED_OVER", bound)
        handed_over.clear()
        assert mx.array_equal(autoencoder.decode(latents), whole)
        sizes.append(len(handed_over))
    assert sizes[0] == 0 < sizes[1] < sizes[2] == 3 + 7 * stages


def test_no_more_than_two_pieces_are_held(model, monkeypatch, handed_over):
    """What a piece returned is let go of as soon as the one after the next is handed over."""
    autoencoder, _ = model
    latents, most = mx.array(normal(7, (2, 5, 8))[0]), 0
    monkeypatch.setattr("mlx_audio_native.oobleck._HANDED_OVER", 1)
    decode = autoencoder._states

    def states(part):
        nonlocal most
        for state in decode(part):
            most = max(most, sum(any(array() is not None for array in arrays) for arrays in handed_over))
            yield state

    monkeypatch.setattr(autoencoder, "_states", states)
    autoencoder.decode(latents)
    assert most == 2
    assert not any(array() for arrays in handed_over[:-2] for array in arrays)


@pytest.mark.parametrize("freed", [0, 2])
def test_it_waits_for_memory_that_is_due_but_not_for_long(model, monkeypatch, handed_over, freed):
    """`freed` is how often there is too much before there is not."""
    autoencoder, _ = model
    latents = mx.array(normal(6, (1, 5, 8))[0])
    expected, asked = autoencoder.decode(latents), []
    monkeypatch.setattr("mlx_audio_native.oobleck._HANDED_OVER", 1)
    monkeypatch.setattr("mlx_audio_native.oobleck._PATIENCE", 60)

    def active() -> int:
        asked.append(0)
        return 2**40 if 1 < len(asked) <= 1 + freed else 0

    monkeypatch.setattr(mx, "get_active_memory", active)
    assert mx.array_equal(autoencoder.decode(latents), expected)
    assert len(asked) == 1 + freed + len(handed_over)
    monkeypatch.setattr("mlx_audio_native.oobleck._PATIENCE", 0)
    monkeypatch.setattr("mlx_audio_native.oobleck._HELD", -1)
    assert mx.array_equal(autoencoder.decode(latents), expected)


def test_the_small_release_is_evaluated_piece_by_piece_at_its_full_rate():
    """In half precision, where any piece of the last stage returns as much; more clips in bites so much larger."""
    config = ModelConfig.from_dict(release_config(SMALL), ["autoencoder"]).autoencoder
    assert 2 * config.decoded_frames(256) * config.decoder.widths[0] == _HANDED_OVER == 2 * config.largest(256)


def test_the_small_release_decodes_eight_windows_at_once():
    config = ModelConfig.from_dict(release_config(SMALL), ["autoencoder"]).autoencoder
    assert 8 * 2 * config.largest(256) == 8 * 2 * 128 * 2**19 == _LARGEST


def test_half_precision_gives_float32_audio(small_folder: Path):
    folder, _ = tame(small_folder)
    half = load_parts(folder, ["autoencoder"], "float16").autoencoder
    whole = load_parts(folder, ["autoencoder"], "float32").autoencoder
    latents = mx.array(normal(0, (1, 20, 8))[0])
    found, expected = half.decode(latents), whole.decode(latents)
    assert (half.dtype, found.dtype) == (mx.float16, mx.float32)
    assert (mx.square(found - expected).mean() / mx.square(expected).mean()).sqrt().item() < 0.02


def test_refusals(model):
    autoencoder, _ = model
    for shape in ((9, 8), (1, 9, 7), (1, 0, 8), (0, 9, 8)):
        with pytest.raises(InputError, match="latents must be"):
            autoencoder.decode(mx.zeros(shape))
    ratio = autoencoder.config.downsampling_ratio
    for shape in ((ratio, 2), (1, ratio, 1), (1, ratio - 1, 2), (0, ratio, 2)):
        with pytest.raises(InputError, match="audio must be"):
            autoencoder.encode(mx.zeros(shape))


def test_a_decoder_alone_decodes_the_same_and_cannot_encode(small_folder: Path, tmp_path: Path):
    values = json.loads((small_folder / "config.json").read_text())
    del values["model"]["pretransform"]["config"]["encoder"]
    tensors = read_tensors(small_folder, ["autoencoder"])
    save(tmp_path / "alone", values, {name: array for name, array in tensors.items() if ".encoder." not in name})
    alone, whole = (load_parts(folder, ["autoencoder"]).autoencoder for folder in (tmp_path / "alone", small_folder))
    latents = mx.array(normal(0, (1, 6, 8))[0])
    assert mx.array_equal(alone.decode(latents), whole.decode(latents))
    with pytest.raises(InputError, match="has no encoder"):
        alone.encode(mx.zeros((1, 64, 2)))
    with pytest.raises(WeightsError, match="has no place"):
        save(tmp_path / "other", values, tensors)
