"""The joined snake: its plain twin against the definition, and the kernel."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlx_audio_native import cuda
from mlx_audio_native.cuda_snake import plain_snake, snake

FORMS = [
    dict(zip(("biased", "residual", "keep", "skip"), form, strict=True)) for form in product(*3 * [(0, 1)], (0, 3))
]


def drawn(dtype: mx.Dtype, channels: int, biased: int, residual: int, keep: int, skip: int):
    """The arguments of a snake of 2 clips of 5 frames."""
    keys = iter(mx.random.split(mx.random.key(0), 5))

    def draw(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys)).astype(dtype)

    x, vectors = draw(2, 5 + 2 * skip, channels), [draw(channels) for _ in range(3)]
    total = draw(2, 5, channels)
    return x, vectors[0] if biased else None, total if residual else None, *vectors[1:], bool(keep), skip


def relative(found: mx.array, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    off = np.array(found.astype(mx.float32), np.float64) - expected
    return np.sqrt((off**2).mean() / (expected**2).mean())


def defined(x, bias, residual, frequency, magnitude, keep, skip) -> list[np.ndarray]:
    x, bias, residual, frequency, magnitude = (
        np.array(0 if term is None else term.astype(mx.float32), np.float64)
        for term in (x, bias, residual, frequency, magnitude)
    )
    total = x[:, skip : x.shape[1] - skip] + bias + residual
    return [total, total + magnitude * np.sin(frequency * total) ** 2][not keep :]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_twin_equals_the_definition(form):
    given = drawn(mx.float32, 6, **form)
    found = [array for array in plain_snake(*given) if array is not None]
    assert all(relative(*pair) < 1e-6 for pair in zip(found, defined(*given), strict=True))


@pytest.mark.parametrize(
    ("dtype", "bound", "forms"),
    [
        (mx.float16, 2e-3, [FORMS[0], FORMS[9], FORMS[-1]]),
        pytest.param(mx.float16, 2e-3, FORMS, marks=pytest.mark.slow),
        pytest.param(mx.float32, 1e-6, FORMS, marks=pytest.mark.slow),
    ],
    ids=["some", "float16", "float32"],
)
def test_the_kernel_equals_the_definition(dtype, bound, forms, cuda_kernels):
    for form in forms:
        given = drawn(dtype, 24, **form)
        found = [array for array in snake(*given) if array is not None]
        assert all(relative(*pair) < bound for pair in zip(found, defined(*given), strict=True)), form
    assert cuda_kernels == ["snake"] * len(forms)


def test_channels_that_fit_no_thread(cuda_kernels):
    snake(*drawn(mx.float16, 12, biased=1, residual=1, keep=1, skip=3))
    assert not cuda_kernels


def test_another_source_has_another_name(monkeypatch):
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **kernel: kernel["name"])
    assert len({cuda.build.__wrapped__("name", ("x",), ("out",), source) for source in ("a", "b", "a")}) == 2
