"""Every operator, on NumPy and on MLX arrays, against its definition; and random small graphs of them."""

import math

import mlx.core as mx
import numpy as np
import pytest
from graphs import GraphBuilder
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from extraction import ExtractionError
from extraction.evaluate import Evaluator
from extraction.graph import Wiring
from extraction.schema import read

X = np.array([[-2.5, -0.5, 0.0], [0.25, 1.5, 7.0]], np.float32)
POSITIVE = np.abs(X) + np.float32(0.5)
WHOLE = np.array([[3, -7, 0], [5, 2, 9]], np.int64)
ERF = np.vectorize(math.erf)
# operator, its operands after the first, the first, what it must give, its options
CASES = [
    ("ADD", [X[1]], X, X + X[1], {}),
    ("SUB", [X[:, :1]], X, X - X[:, :1], {}),
    ("MUL", [np.float32(3)], X, X * 3, {}),
    ("DIV", [POSITIVE], X, X / POSITIVE, {}),
    ("DIV", [np.array([2, 2, 2])], WHOLE, np.trunc(WHOLE / 2).astype(int), {}),
    ("FLOOR_DIV", [np.array([2, 2, 2])], WHOLE, WHOLE // 2, {}),
    ("FLOOR_MOD", [np.array([4, 4, 4])], WHOLE, WHOLE % 4, {}),
    ("POW", [np.float32(3)], X, X**3, {}),
    ("POW", [np.float32(0.5)], POSITIVE, POSITIVE**0.5, {}),
    ("SQUARED_DIFFERENCE", [X[1]], X, (X - X[1]) ** 2, {}),
    ("MINIMUM", [np.float32(1)], X, np.minimum(X, 1), {}),
    ("MAXIMUM", [np.float32(1)], X, np.maximum(X, 1), {}),
    ("LESS", [np.float32(0)], X, X < 0, {}),
    ("LESS_EQUAL", [np.float32(0)], X, X <= 0, {}),
    ("GREATER", [np.float32(0)], X, X > 0, {}),
    ("GREATER_EQUAL", [np.float32(0)], X, X >= 0, {}),
    ("EQUAL", [np.array([3, 2, 9])], WHOLE, WHOLE == [3, 2, 9], {}),
    ("NOT_EQUAL", [np.array([3, 2, 9])], WHOLE, WHOLE != [3, 2, 9], {}),
    ("ADD_N", [X, X], X, 3 * X, {}),
    ("NEG", [], X, -X, {}),
    ("ABS", [], X, np.abs(X), {}),
    ("SIGN", [], X, np.sign(X), {}),
    ("EXP", [], X, np.exp(X), {}),
    ("LOG", [], POSITIVE, np.log(POSITIVE), {}),
    ("SQRT", [], POSITIVE, np.sqrt(POSITIVE), {}),
    ("RSQRT", [], POSITIVE, POSITIVE**-0.5, {}),
    ("SQUARE", [], X, X * X, {}),
    ("SIN", [], X, np.sin(X), {}),
    ("COS", [], X, np.cos(X), {}),
    ("TANH", [], X, np.tanh(X), {}),
    ("LOGISTIC", [], X, 1 / (1 + np.exp(-X)), {}),
    ("FLOOR", [], X, np.floor(X), {}),
    ("CEIL", [], X, np.ceil(X), {}),
    ("ROUND", [], X, np.round(X), {}),
    ("ELU", [], X, np.where(X > 0, X, np.expm1(X)), {}),
    ("RELU", [], X, np.clip(X, 0, None), {}),
    ("RELU6", [], X, np.clip(X, 0, 6), {}),
    ("RELU_0_TO_1", [], X, np.clip(X, 0, 1), {}),
    ("RELU_N1_TO_1", [], X, np.clip(X, -1, 1), {}),
    ("GELU", [], X, 0.5 * X * (1 + ERF(X / math.sqrt(2))), {"Approximate": False}),
    ("GELU", [], X, 0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))), {"Approximate": True}),
    ("QUANTIZE", [], X, X, {}),
    ("DEQUANTIZE", [], X, X, {}),
    ("MEAN", [np.array([1])], X, X.mean(1), {"KeepDims": False}),
    ("SUM", [np.array([-1])], X, X.sum(1, keepdims=True), {"KeepDims": True}),
    ("SOFTMAX", [], X, np.exp(2 * X) / np.exp(2 * X).sum(-1, keepdims=True), {"Beta": 2.0}),
    ("FULLY_CONNECTED", [X, np.float32([1, 2])], X, X @ X.T + [1, 2], {}),
    ("BATCH_MATMUL", [X], X, X @ X.T, {"AdjY": True}),
    ("BATCH_MATMUL", [X], X, X.T @ X, {"AdjX": True}),
    ("GATHER", [np.array([1, 0, 1])], X, X[[1, 0, 1]], {}),
    ("GATHER", [np.array([2, 2])], X, X[:, [2, 2]], {"Axis": 1}),
    ("GATHER_ND", [np.array([[1, 2], [0, 0]])], X, X[[1, 0], [2, 0]], {}),
    ("RESHAPE", [np.array([3, -1])], X, X.reshape(3, 2), {}),
    ("EXPAND_DIMS", [np.array([0])], X, X[None], {}),
    ("SQUEEZE", [], X[None], X, {"SqueezeDims": (0,)}),
    ("TRANSPOSE", [np.array([1, 0])], X, X.T, {}),
    ("BROADCAST_TO", [np.array([2, 2, 3])], X, np.broadcast_to(X, (2, 2, 3)), {}),
    ("SLICE", [np.array([0, 1]), np.array([-1, 2])], X, X[:, 1:3], {}),
    ("STRIDED_SLICE", [np.array([0, 2]), np.array([2, 0]), np.array([1, -1])], X, X[:, 2:0:-1], {}),
    ("STRIDED_SLICE", [np.array([1, 0]), np.array([2, 3]), np.array([1, 1])], X, X[1], {"ShrinkAxisMask": 1}),
    (
        "STRIDED_SLICE",
        [np.array([1, 1]), np.array([0, 0]), np.array([1, 1])],
        X,
        X[:, 1:],
        {"BeginMask": 1, "EndMask": 3},
    ),
    ("CONCATENATION", [X, X], X, np.concatenate([X, X, X], -1), {"Axis": -1}),
    ("PACK", [X], X, np.stack([X, X], 1), {"Axis": 1}),
    ("TILE", [np.array([2, 1])], X, np.tile(X, (2, 1)), {}),
    ("PAD", [np.array([[1, 0], [0, 2]])], X, np.pad(X, ((1, 0), (0, 2))), {}),
    ("REVERSE_V2", [np.array([1])], X, X[:, ::-1], {}),
    ("ZEROS_LIKE", [], X, 0 * X, {}),
    ("SHAPE", [], X, [2, 3], {}),
    ("RANK", [], X, 2, {}),
    ("LEAKY_RELU", [], X, np.where(X > 0, X, 0), {}),
    ("REDUCE_MAX", [np.array([0])], X, X.max(0), {}),
    ("REDUCE_MIN", [np.array([0])], X, X.min(0), {}),
    ("REDUCE_PROD", [np.array([1])], X, X.prod(1), {}),
    ("REDUCE_ANY", [np.array([1])], X > 0, [False, True], {}),
    ("REDUCE_ALL", [np.array([1])], X > 0, [False, True], {}),
    ("LOGICAL_NOT", [], X > 0, X <= 0, {}),
    ("CUMSUM", [np.array(1)], X, X.cumsum(1), {}),
    ("PADV2", [np.array([[1, 0], [0, 0]]), np.float32(5)], X, np.pad(X, ((1, 0), (0, 0)), constant_values=5), {}),
]


def wire(tmp_path, builder, inputs, outputs) -> Wiring:
    path = tmp_path / "graph.tflite"
    path.write_bytes(builder.finish(inputs, outputs))
    return Wiring(read(path))


@pytest.mark.parametrize(
    ("xp", "precision", "bound"), [(np, "float64", 1e-6), (mx, "float32", 2e-6)], ids=["numpy", "mlx"]
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_operator_by_its_definition(tmp_path, case, xp, precision, bound):
    name, operands, first, expected, options = case
    b = GraphBuilder()
    x = b.tensor(first.shape, {"i": "INT64", "b": "BOOL", "f": "FLOAT32"}[first.dtype.kind])
    constants = [b.constant(value, "i4" if np.asarray(value).dtype.kind == "i" else "f4") for value in operands]
    y = b.op(name, x, *constants, shape=np.shape(expected), **options)
    with mx.stream(mx.cpu):
        found = np.asarray(Evaluator(wire(tmp_path, b, [x], [y]), xp, precision).run({x: first}, [y])[0])
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)


def test_several_outputs_and_selection(tmp_path):
    b = GraphBuilder()
    x = b.tensor((2, 4))
    parts = b.op("SPLIT", [1], x, outputs=2)
    sized = b.op("SPLIT_V", x, [1, 3], [1], outputs=2)
    rows = b.op("UNPACK", x, outputs=2)
    chosen = b.op("SELECT_V2", b.op("GREATER", x, [0.0], kind="BOOL"), x, [9.0])
    hot = b.op("ONE_HOT", [2, 0], b.constant(3, "i4"), b.constant(1.0), b.constant(0.0), Axis=-1)
    counted = b.op("RANGE", b.constant(1, "i4"), b.constant(8, "i4"), b.constant(3, "i4"), kind="INT32")
    filled = b.op("FILL", [2, 2], b.constant(4.0))
    both = b.op(
        "LOGICAL_AND", b.op("LESS", x, [6.0]), b.op("LOGICAL_OR", b.op("GREATER", x, [0.0]), b.op("LESS", x, [-3.0]))
    )
    cast = b.op("CAST", b.op("CAST", x, shape=(2, 4), kind="INT32"), shape=(2, 4), kind="BOOL")
    old = b.op("SELECT", b.op("EQUAL", [1, 2], [1, 1]), x, b.op("NEG", x))
    looked = b.op("EMBEDDING_LOOKUP", [1, 0], x)
    pointwise = b.op(
        "CONV_2D", b.op("RESHAPE", x, [1, 1, 2, 4]), np.ones((3, 1, 1, 4)), [1.0, 2.0, 3.0], StrideW=1, StrideH=1
    )
    outputs = [parts + 1, sized + 1, rows, chosen, hot, counted, filled, both, cast, old, looked, pointwise]
    value = np.array([[1.0, -2.0, 3.0, -4.0], [5.0, 6.0, 7.0, 8.0]])
    found = Evaluator(wire(tmp_path, b, [x], outputs)).run({x: value}, outputs)
    expected = [value[:, 2:], value[:, 1:], value[0], np.where(value > 0, value, 9), np.eye(3)[[2, 0]], [1, 4, 7]]
    expected += [np.full((2, 2), 4.0), (value < 6) & ((value > 0) | (value < -3)), value != 0]
    expected += [value * [[1], [-1]], value[::-1], value.sum(-1)[None, None, :, None] + [1, 2, 3]]
    for array, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)


STEPS = ("ADD", "MUL", "MINIMUM", "NEG", "TANH", "SOFTMAX", "TRANSPOSE", "RESHAPE", "FULLY_CONNECTED", "SLICE", "MEAN")


@given(first=npst.arrays(np.float32, (2, 3), elements=st.floats(-4, 4, width=16)), data=st.data())
def test_random_graphs_agree_with_numpy_and_mlx(tmp_path_factory, first, data):
    b = GraphBuilder()
    x = y = b.tensor((2, 3))
    value = first.astype(np.float64)
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=8)):
        rows, width = value.shape
        other = np.asarray(
            data.draw(npst.arrays(np.float32, (width,), elements=st.floats(-2, 2, width=16))), np.float64
        )
        if step in ("ADD", "MUL", "MINIMUM"):
            value = {"ADD": np.add, "MUL": np.multiply, "MINIMUM": np.minimum}[step](value, other)
            y = b.op(step, y, other)
        elif step == "NEG":
            value, y = -value, b.op(step, y)
        elif step == "TANH":
            value, y = np.tanh(value), b.op(step, y)
        elif step == "SOFTMAX":
            exponentials = np.exp(value - value.max(-1, keepdims=True))
            value, y = exponentials / exponentials.sum(-1, keepdims=True), b.op(step, y, Beta=1.0)
        elif step == "TRANSPOSE":
            value, y = value.T, b.op(step, y, [1, 0])
        elif step == "RESHAPE":
            value, y = value.reshape(width, rows), b.op(step, y, [width, rows])
        elif step == "FULLY_CONNECTED":
            value, y = value @ other[None].T, b.op(step, y, other[None], -1)
        elif step == "SLICE":
            value, y = value[:, :1], b.op(step, y, [0, 0], [-1, 1])
        else:
            value, y = value.mean(1, keepdims=True), b.op(step, y, [1], KeepDims=True)
    wiring = wire(tmp_path_factory.getbasetemp(), b, [x], [y])
    np.testing.assert_allclose(Evaluator(wiring).run({x: first}, [y])[0], value, rtol=1e-9, atol=1e-9)
    with mx.stream(mx.cpu):
        found = np.asarray(Evaluator(wiring, mx, "float32").run({x: first}, [y])[0])
    np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4)


def test_constants_are_folded_in_float32_and_keep_half_precision(tmp_path):
    b = GraphBuilder()
    half = b.tensor((3,), "FLOAT16", np.float16([3.14, 0.1, 1e-7]).tobytes())
    widened = b.op("DEQUANTIZE", half, shape=(3,))
    product = b.op("MUL", [0.1], [3.0])
    evaluator = Evaluator(wire(tmp_path, b, [], [widened, product]))
    assert evaluator.constant(widened).dtype == np.float16
    assert evaluator.constant(product)[0] == np.float32(0.1) * np.float32(3)


@pytest.mark.parametrize(
    ("name", "operands", "problem"),
    [
        ("BROADCAST_TO", [[2**20, 2**20]], "would make a tensor"),
        ("TILE", [[2**30]], "would make a tensor"),
        ("FILL", [], "cannot work on its operands"),
        ("RESHAPE", [[7]], "cannot work on its operands"),
        ("GATHER", [[5]], "an index outside 0 to 0"),
        ("TOPK_V2", [], "is not supported"),
    ],
)
def test_what_cannot_be_evaluated_is_named(tmp_path, name, operands, problem):
    b = GraphBuilder()
    x = b.tensor((1,))
    y = b.op(name, x, *operands)
    with pytest.raises(ExtractionError, match=f"operator 0 {name} .*{problem}|operator 0 {name} {problem}"):
        Evaluator(wire(tmp_path, b, [x], [y])).run({x: np.ones(1)}, [y])
