"""TFLite's convolutions, on NumPy and on MLX arrays, against their definitions point by point."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from graphs import GraphBuilder

from extraction import ExtractionError
from extraction.evaluate import Evaluator
from extraction.graph import Wiring
from extraction.schema import read

SAME, VALID = 0, 1
ON = pytest.mark.parametrize("xp", [np, mx], ids=["numpy", "mlx"])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def evaluate(folder: Path, b: GraphBuilder, x: np.ndarray, source: int, output: int, xp) -> np.ndarray:
    path = folder / "graph.tflite"
    path.write_bytes(b.finish([source], [output]))
    precision = "float64" if xp is np else "float32"
    return np.asarray(Evaluator(Wiring(read(path)), xp, precision).run({source: x}, [output])[0])


def define_convolution(x, weight, bias, padding, strides, dilations):
    """Each output point as the sum over the kernel's points that lie inside x."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[1:3], strict=True)]
    sizes, starts = [], []
    for size, length, stride in zip(x.shape[1:3], reach, strides, strict=True):
        out = -(-size // stride) if padding == SAME else (size - length) // stride + 1
        sizes.append(out)
        starts.append(max((out - 1) * stride + length - size, 0) // 2 if padding == SAME else 0)
    result = np.zeros((x.shape[0], *sizes, len(weight))) + bias
    for row, column, top, left in np.ndindex(*sizes, *weight.shape[1:3]):
        y = row * strides[0] + top * dilations[0] - starts[0]
        z = column * strides[1] + left * dilations[1] - starts[1]
        if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
            result[:, row, column] += x[:, y, z] @ weight[:, top, left].T
    return result


@ON
@pytest.mark.parametrize("padding", [SAME, VALID])
@pytest.mark.parametrize(
    ("size", "kernel", "strides", "dilations"),
    [
        ((1, 20), (1, 7), (1, 1), (1, 3)),
        ((1, 60), (1, 7), (1, 1), (1, 9)),
        ((9, 8), (3, 2), (2, 3), (1, 1)),
        ((7, 1), (4, 1), (2, 1), (2, 1)),
    ],
)
def test_a_convolution(tmp_path, xp, padding, size, kernel, strides, dilations):
    x, weight, bias = normal(0, 2, *size, 3), normal(1, 4, *kernel, 3), normal(2, 4)
    b = GraphBuilder()
    source = b.tensor(x.shape)
    options = {"StrideH": strides[0], "StrideW": strides[1]}
    options |= {"DilationHFactor": dilations[0], "DilationWFactor": dilations[1], "Padding": padding}
    output = b.op("CONV_2D", source, weight, bias, **options)
    found = evaluate(tmp_path, b, x, source, output, xp)
    expected = define_convolution(*(a.astype(np.float64) for a in (x, weight, bias)), padding, strides, dilations)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (1e-12 if xp is np else 1e-5) * np.abs(expected).max()


@ON
@pytest.mark.parametrize(("length", "stride", "out", "before"), [(5, 4, 20, 2), (6, 3, 18, 1), (4, 2, 10, 0)])
def test_a_transposed_convolution(tmp_path, xp, length, stride, out, before):
    """Each input point spreads the kernel; `before` points are cut away in front, where SAME pads."""
    kernel = 2 * stride
    x, weight, bias = normal(0, 2, 1, length, 3), normal(1, 4, 1, kernel, 3), normal(2, 4)
    whole = np.zeros((2, length * stride + kernel, 4))
    for place in range(length):
        for tap in range(kernel):
            whole[:, place * stride + tap] += x[:, 0, place].astype(np.float64) @ weight[:, 0, tap].T
    expected = whole[:, None, before : before + out] + bias
    b = GraphBuilder()
    source = b.tensor(x.shape)
    output = b.op(
        "TRANSPOSE_CONV",
        *([2, 1, out, 4], weight, source, bias),
        **{"StrideH": 1, "StrideW": stride, "Padding": SAME if before else VALID},
    )
    found = evaluate(tmp_path, b, x, source, output, xp)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (1e-12 if xp is np else 1e-5) * np.abs(expected).max()


@pytest.mark.parametrize("options", [{"StrideW": 0, "StrideH": 1}, {"StrideW": 1, "StrideH": 1, "Padding": 7}])
def test_strides_and_paddings_that_cannot_be(tmp_path, options):
    b = GraphBuilder()
    source = b.tensor((1, 1, 4, 3))
    output = b.op("CONV_2D", source, normal(0, 2, 1, 1, 3), **options)
    with pytest.raises(ExtractionError, match="that cannot be"):
        evaluate(tmp_path, b, normal(1, 1, 1, 4, 3), source, output, np)
