"""The seconds formula, recovered from every spelling that keeps its meaning, and refused where it is another."""

from math import isclose

import numpy as np
import pytest
from graphs import GraphBuilder

from extraction import ExtractionError
from extraction.evaluate import Evaluator
from extraction.graph import Wiring
from extraction.schema import read
from extraction.seconds import Seconds, recover

PI = float(np.float32(np.pi))
W = np.random.default_rng(2).standard_normal(6).astype(np.float32)
DENSE = np.random.default_rng(3).standard_normal((5, 13)).astype(np.float32)
BIAS = np.random.default_rng(4).standard_normal(5).astype(np.float32)


def clipped(b: GraphBuilder, s: int) -> int:
    return b.op("MUL", b.op("RELU", b.op("MINIMUM", s, 256.0)), 1 / 256)


def angles(b: GraphBuilder, x: int) -> int:
    return b.op("MUL", b.op("MUL", b.op("MUL", b.op("RESHAPE", x, [1, 1]), W[None]), 2.0), np.pi)


def joined(b: GraphBuilder, x: int, a: int) -> int:
    return b.op("CONCATENATION", b.op("RESHAPE", x, [1, 1]), b.op("SIN", a), b.op("COS", a), Axis=-1)


def dense(b: GraphBuilder, features: int) -> int:
    return b.op("FULLY_CONNECTED", features, DENSE, BIAS, shape=(1, 5))


def recovered(tmp_path, build) -> Seconds:
    b = GraphBuilder()
    s = b.tensor((1,))
    path = tmp_path / "graph.tflite"
    path.write_bytes(b.finish([s], [build(b, s)]))
    wiring = Wiring(read(path))
    return recover(wiring, Evaluator(wiring), wiring.linears(), s)


def with_number(number):
    def build(b, s):
        x = number(b, s)
        return dense(b, joined(b, x, angles(b, x)))

    return build


NUMBERS = {
    "as torch traces it": (clipped, 0, 256, 1 / 256),
    "clips swapped": (lambda b, s: b.op("MUL", b.op("MINIMUM", b.op("RELU", s), 256.0), 1 / 256), 0, 256, 1 / 256),
    "constants first": (
        lambda b, s: b.op("MUL", [1 / 256], b.op("MAXIMUM", [0.0], b.op("MINIMUM", [256.0], s))),
        0,
        256,
        1 / 256,
    ),
    "a quotient": (lambda b, s: b.op("DIV", b.op("RELU", b.op("MINIMUM", s, 256.0)), 256.0), 0, 256, None),
    "fused activation": (
        lambda b, s: b.op("MUL", b.op("MINIMUM", b.op("ADD", s, 0.0, FusedActivationFunction=1), 256.0), 1 / 256),
        *(0, 256, 1 / 256),
    ),
    "clipped after scaling": (
        lambda b, s: b.op("MINIMUM", b.op("RELU", b.op("MUL", s, 1 / 512)), 1.0),
        *(0, 512, 1 / 512),
    ),
    "RELU_0_TO_1 after an odd scale": (
        lambda b, s: b.op("RELU_0_TO_1", b.op("MUL", b.op("SUB", s, 1.0), 1 / 511)),
        *(1, 512, float(np.float32(1 / 511))),
    ),
    "minimum above zero": (
        lambda b, s: b.op("MUL", b.op("SUB", b.op("MAXIMUM", b.op("MINIMUM", s, 48.0), 1.0), 1.0), 1 / 47),
        *(1, 48, float(np.float32(1 / 47))),
    ),
    "minimum below zero, added": (
        lambda b, s: b.op("MUL", b.op("ADD", b.op("MAXIMUM", b.op("MINIMUM", s, 2.0), -2.0), 2.0), 0.25),
        *(-2, 2, 0.25),
    ),
    "casts and moves between": (
        lambda b, s: b.op("CAST", b.op("SQUEEZE", b.op("EXPAND_DIMS", clipped(b, s), [0]), SqueezeDims=(0,))),
        *(0, 256, 1 / 256),
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_clip_offset_and_scale(tmp_path, name):
    number, low, high, scale = NUMBERS[name]
    found = recovered(tmp_path, with_number(number))
    assert (found.min, found.max, found.scale) == (low, high, scale)
    assert found.features == ("x", "sin", "cos") and found.angle_constants == (2.0, PI)
    np.testing.assert_array_equal(found.frequencies, W)
    np.testing.assert_array_equal(found.weight, DENSE)
    np.testing.assert_array_equal(found.bias, BIAS)


def test_the_formula_reads_as_it_is_written(tmp_path):
    formula = recovered(tmp_path, with_number(clipped)).formula
    assert formula == "clip(s, 0, 256)·0.00390625 → [x, sin(x·w·2·π), cos(x·w·2·π)] @ Wᵀ + b"
    formula = recovered(tmp_path, with_number(NUMBERS["minimum above zero"][0])).formula
    assert formula.startswith("(clip(s, 1, 48) - 1)·0.0212765951 → [x, sin(")


FACTORS = {
    "folded into the frequencies": (lambda b, x: b.op("MUL", x, (W * np.float32(2) * np.float32(np.pi))[None]), ()),
    "folded by the graph": (lambda b, x: b.op("MUL", b.op("MUL", b.op("MUL", W[None], 2.0), np.pi), x), ()),
    "half-precision pi": (
        lambda b, x: b.op("MUL", b.op("MUL", b.op("MUL", x, W[None]), 2.0), 3.140625),
        (2.0, 3.140625),
    ),
    "one factor": (lambda b, x: b.op("MUL", b.op("MUL", x, W[None]), 2 * np.pi), (float(np.float32(2 * np.pi)),)),
    "three factors": (
        lambda b, x: b.op("MUL", b.op("MUL", b.op("MUL", b.op("MUL", x, W[None]), np.pi), 4.0), 0.5),
        (PI, 4.0, 0.5),
    ),
    "factors before": (lambda b, x: b.op("MUL", W[None], b.op("MUL", b.op("MUL", x, 2.0), np.pi)), (2.0, PI)),
    "negated": (lambda b, x: b.op("NEG", b.op("MUL", b.op("MUL", x, W[None]), 2.0)), (2.0, -1.0)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_angle_factors_in_their_order(tmp_path, name):
    make, factors = FACTORS[name]

    def build(b, s):
        x = b.op("RESHAPE", clipped(b, s), [1, 1])
        return dense(b, joined(b, x, make(b, x)))

    found = recovered(tmp_path, build)
    assert found.angle_constants == factors
    folded = (W * np.float32(2)) * np.float32(np.pi)
    np.testing.assert_array_equal(found.frequencies, folded if "folded" in name else W)
    assert bool(found.notes) == (name == "factors before")


@pytest.mark.parametrize(
    "order", [("cos", "sin", "x"), ("sin", "x", "cos"), ("x", "cos", "sin"), ("sin", "cos"), ("x", "cos")]
)
def test_feature_order_is_recovered_never_assumed(tmp_path, order):
    def build(b, s):
        x = b.op("RESHAPE", clipped(b, s), [1, 1])
        a = angles(b, x)
        features = {"x": x, "sin": b.op("SIN", a), "cos": b.op("COS", a)}
        joint = b.op("CONCATENATION", *(features[name] for name in order), Axis=1)
        width = sum(1 if name == "x" else 6 for name in order)
        return b.op("FULLY_CONNECTED", joint, DENSE[:, :width], BIAS, shape=(1, 5))

    found = recovered(tmp_path, build)
    assert found.features == order and found.scale == 1 / 256 and found.angle_constants == (2.0, PI)


def test_interleaved_features_are_sorted_into_blocks_with_their_columns(tmp_path):
    places = np.random.default_rng(5).permutation(13)

    def build(b, s):
        x = clipped(b, s)
        mixed = b.op("GATHER", joined(b, x, angles(b, x)), places, Axis=1)
        return dense(b, mixed)

    found = recovered(tmp_path, build)
    assert set(found.features) == {"x", "sin", "cos"} and any("interleaved" in note for note in found.notes)
    # each column still meets the feature that it met in the graph
    columns = {
        (("x", 0) if i == 0 else ("sin", W[i - 1]) if i < 7 else ("cos", W[i - 7])): DENSE[:, places.tolist().index(i)]
        for i in range(13)
    }
    at = 0
    for name in found.features:
        for frequency in [0] if name == "x" else found.frequencies:
            np.testing.assert_array_equal(found.weight[:, at], columns[name, frequency])
            at += 1


def test_slices_that_change_nothing_are_nothing(tmp_path):
    def build(b, s):
        x = clipped(b, s)
        features = b.op("SLICE", joined(b, x, angles(b, x)), [0, 0], [1, -1])
        whole = b.op("STRIDED_SLICE", features, [0, 0], [1, 13], [1, 1])
        return dense(
            b, b.op("CONCATENATION", b.op("SLICE", whole, [0, 0], [1, 4]), b.op("SLICE", whole, [0, 4], [1, 9]), Axis=1)
        )

    found = recovered(tmp_path, build)
    np.testing.assert_array_equal(found.weight, DENSE)
    assert found.notes == ()


INEXPRESSIBLE = {
    "no clip": (with_number(lambda b, s: b.op("MUL", s, 1 / 256)), "clipped to -inf and inf"),
    "one clip": (with_number(lambda b, s: b.op("MUL", b.op("RELU", s), 1 / 256)), "clipped to 0 and inf"),
    "a shift of its own": (with_number(lambda b, s: b.op("SUB", clipped(b, s), 0.25)), "is subtracted"),
    "a square": (with_number(lambda b, s: b.op("SQUARE", clipped(b, s))), "two computed values"),
    "a phase": (
        lambda b, s: dense(b, joined(b, clipped(b, s), b.op("ADD", angles(b, clipped(b, s)), 0.5))),
        "inside an angle",
    ),
    "other sines than cosines": (
        lambda b, s: dense(
            b,
            b.op(
                "CONCATENATION",
                *(b.op("RESHAPE", clipped(b, s), [1, 1]), b.op("SIN", angles(b, clipped(b, s)))),
                b.op("COS", b.op("MUL", angles(b, clipped(b, s)), 2.0)),
                Axis=1,
            ),
        ),
        "different angles",
    ),
    "an exponential": (with_number(lambda b, s: b.op("EXP", clipped(b, s))), "EXP"),
    "a constant feature": (
        lambda b, s: dense(
            b,
            b.op(
                "PAD",
                b.op("SLICE", joined(b, clipped(b, s), angles(b, clipped(b, s))), [0, 0], [1, 12]),
                [[0, 0], [0, 1]],
            ),
        ),
        "features meet a weight",
    ),
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_another_formula_ends_in_the_slice_operator_by_operator(tmp_path, name):
    build, problem = INEXPRESSIBLE[name]
    with pytest.raises(ExtractionError, match=problem) as raised:
        recovered(tmp_path, build)
    error = raised.value
    assert "\n" not in error.problem and str(error).splitlines() == [error.problem, *error.details]
    assert error.details[-1].split()[1].startswith("FULLY_CONNECTED(")
    assert [int(line.split()[0]) for line in error.details] == sorted({int(line.split()[0]) for line in error.details})


def test_two_products_of_one_input_must_agree(tmp_path):
    def twice(other):
        def build(b, s):
            x = clipped(b, s)
            first = dense(b, joined(b, x, angles(b, x)))
            return b.op("ADD", first, b.op("FULLY_CONNECTED", joined(b, x, angles(b, x)), other, BIAS))

        return build

    assert len(recovered(tmp_path, twice(DENSE)).linears) == 2
    with pytest.raises(ExtractionError, match="embedded twice"):
        recovered(tmp_path, twice(DENSE + 1))


def test_half_precision_constants_stay_what_they_are(tmp_path):
    def half(b, values):
        array = np.float16(values)
        return b.op("DEQUANTIZE", b.tensor(array.shape, "FLOAT16", array.tobytes()), shape=array.shape)

    def build(b, s):
        x = b.op("MUL", b.op("RELU", b.op("MINIMUM", s, half(b, 256))), half(b, 1 / 47))
        a = b.op(
            "MUL", b.op("MUL", b.op("MUL", b.op("RESHAPE", x, [1, 1]), half(b, W[None])), half(b, 2)), half(b, np.pi)
        )
        return b.op("FULLY_CONNECTED", joined(b, x, a), half(b, DENSE), half(b, BIAS), shape=(1, 5))

    found = recovered(tmp_path, build)
    assert found.angle_constants == (2.0, 3.140625) and isclose(found.scale, float(np.float16(1 / 47)), rel_tol=0)
    assert found.weight.dtype == found.frequencies.dtype == np.float16
    np.testing.assert_array_equal(found.weight, np.float16(DENSE))
