"""The decoder of CUDA's operations: its kernel against the definition, and all together against the decoder."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_audio_native import cuda, cuda_oobleck
from mlx_audio_native.cuda_oobleck import in_blocks, snake
from mlx_audio_native.oobleck import Autoencoder
from mlx_audio_native.weights import load_parts

# frames, more of them at both ends, signals before and after; pairs
FORMS = [
    {"frames": 5},
    {"frames": 5, "skip": 3},
    {"frames": 10, "skip": 1, "to": 3},
    {"frames": 10, "start": 3},
    {"frames": 18, "start": 9, "to": 2},
    {"frames": 4, "to": 9},
    {"frames": 4, "start": 9},
    {"frames": 5, "pairs": True},
    {"frames": 1, "skip": 2, "pairs": True},
]


def drawn(dtype: mx.Dtype, channels: int, frames: int, skip: int = 0, **form: int):
    """The arguments of a snake of 2 clips."""
    start = form.get("start", 1)
    shapes = [(channels,)] * 3 + [(2 * start, -(-frames // start) + 2 * skip, channels)]
    keys = mx.random.split(mx.random.key(0), 4)
    arrays = [mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=True)]
    *vectors, x = arrays
    return (x, *vectors, frames), form


def defined(x, bias, frequency, magnitude, frames, start=1, to=1, pairs=False) -> np.ndarray:
    """Frame by frame."""
    x, bias, frequency, magnitude = (
        np.array(array.astype(mx.float32), np.float64) for array in (x, bias, frequency, magnitude)
    )
    skip = (x.shape[1] - frames) // 2 if start == 1 else 0
    clips = []
    for clip in range(len(x) // start):
        heard = [x[clip * start + f % start, skip + f // start] + bias for f in range(frames)]
        made = [s + magnitude * np.sin(frequency * s) ** 2 for s in heard]
        zero = np.zeros_like(made[0])
        if pairs:
            clips.append([[*map(np.concatenate, zip([zero, *made], [*made, zero], strict=True))]])
        else:
            made += [zero] * (-frames % to)
            clips.append([made[signal::to] for signal in range(to)])
    return np.concatenate(clips)


def relative(found: mx.array, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    off = np.array(found.astype(mx.float32), np.float64) - expected
    return np.sqrt((off**2).mean() / (expected**2).mean())


@pytest.mark.parametrize(
    ("dtype", "bound", "forms"),
    [
        (mx.float16, 2e-3, [FORMS[2], FORMS[4], FORMS[-1]]),
        pytest.param(mx.float16, 2e-3, FORMS, marks=pytest.mark.slow),
        pytest.param(mx.float32, 1e-6, FORMS, marks=pytest.mark.slow),
    ],
    ids=["some", "float16", "float32"],
)
def test_the_kernel_equals_the_definition(dtype, bound, forms, cuda_kernels):
    """Also zeros where nothing is heard, to the bit."""
    for form in forms:
        given, form = drawn(dtype, 24, **form)
        expected, found = defined(*given, **form), snake(*given, **form)
        assert relative(found, expected) < bound, form
        assert np.array_equal(np.array(found) == 0, expected == 0), form
    assert cuda_kernels == ["snake"] * len(forms)


def test_many_blocks_of_threads(cuda_kernels):
    given, form = drawn(mx.float32, 16, frames=700, to=3)
    assert relative(snake(*given, **form), defined(*given, **form)) < 1e-6


def test_a_convolution_in_blocks_equals_it():
    keys = mx.random.split(mx.random.key(0))
    weight, x = mx.random.normal((2, 7, 3), key=keys[0]), mx.random.normal((2, 40, 3), key=keys[1])
    y = mx.conv1d(x.reshape(2, 5, 24), in_blocks(weight), padding=1).reshape(2, 40, 2)
    assert relative(y, np.array(mx.conv1d(x, weight, padding=3), np.float64)) < 1e-6


STRIDES = {"even": [4, 2], "odd, one": [3, 1, 4]}


@pytest.fixture(params=["even", pytest.param("odd, one", marks=pytest.mark.slow)])
def autoencoder(request: pytest.FixtureRequest, make_folder) -> Autoencoder:
    strides = STRIDES[request.param]

    def edit(config):
        section = config["model"]["pretransform"]["config"]
        for coder in ("encoder", "decoder"):
            section[coder]["config"] |= {"channels": 8, "c_mults": [1, 3, 2][: len(strides)], "strides": strides}
        section["decoder"]["config"]["final_tanh"] = section["decoder"]["soft_clip"] = request.param == "even"
        section["downsampling_ratio"] = int(np.prod(strides))

    made = load_parts(make_folder(edit), ["autoencoder"], "float32").autoencoder
    return made.apply(lambda array: 0.5 * array)  # loud signals make snakes amplify rounding


def test_decoding_by_kernels_equals_decoding(autoencoder, cuda_kernels, monkeypatch):
    latents = mx.random.normal((2, 6, 8), key=mx.random.key(1))
    expected = np.array(autoencoder.decode(latents), np.float64)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    autoencoder.compile()
    found = autoencoder.decode(latents)
    assert relative(found, expected) < 1e-5
    assert cuda_kernels == ["snake"] * (7 * len(autoencoder.config.decoder.strides) + 1)
    monkeypatch.setattr("mlx_audio_native.oobleck._HANDED_OVER", 1)
    assert mx.array_equal(autoencoder.decode(latents), found)
    autoencoder.apply(lambda array: 2 * array)  # weights are those of the first call
    assert mx.array_equal(autoencoder.decode(latents), found)


def test_what_no_kernel_computes(monkeypatch, autoencoder):
    config = autoencoder.config.decoder
    monkeypatch.setattr(cuda, "is_default", lambda: False)
    assert not cuda_oobleck.usable(config)
    monkeypatch.setattr(cuda, "is_default", lambda: True)
    assert cuda_oobleck.usable(config)
    assert not cuda_oobleck.usable(replace(config, use_snake=False))
    assert not cuda_oobleck.usable(replace(config, widths=(8, 12, 16)))


def test_another_source_has_another_name(monkeypatch):
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **kernel: kernel["name"])
    assert len({cuda.build.__wrapped__("name", ("x",), ("out",), source) for source in ("a", "b", "a")}) == 2
