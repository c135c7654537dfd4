"""The reader: it agrees with the schema package where files are sound, and refuses in one line where they are not."""

from pathlib import Path

import numpy as np
import pytest
import tflite
from flatbuffers.number_types import Int32Flags
from graphs import GraphBuilder
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from extraction import ExtractionError, extract, inspect
from extraction.graph import Wiring
from extraction.schema import OPERATORS, TYPES, read

DATA = Path(__file__).parent.parent / "golden" / "data"
FILES = sorted(DATA.glob("*.tflite"))


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "graph.tflite"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reader_agrees_with_the_schema_package(path):
    data = path.read_bytes()
    model = tflite.Model.GetRootAsModel(data, 0)
    expected, graph = model.Subgraphs(0), read(path)
    assert graph.inputs == tuple(expected.InputsAsNumpy().tolist())
    assert graph.outputs == tuple(expected.OutputsAsNumpy().tolist())
    for index in range(expected.TensorsLength()):
        tensor, found = expected.Tensors(index), graph.tensors[index]
        assert found.shape == tuple(tensor.Shape(i) for i in range(tensor.ShapeLength()))
        assert (found.type, found.name) == (TYPES[tensor.Type()], tensor.Name().decode()[:200])
        buffer = model.Buffers(tensor.Buffer())
        stored = (
            buffer.DataAsNumpy() if buffer.DataLength() else data[buffer.Offset() : buffer.Offset() + buffer.Size()]
        )
        assert bytes(found.data or b"") == bytes(stored)
        quantisation = tensor.Quantization()
        if found.quantization is not None:
            np.testing.assert_array_equal(found.quantization.scale, quantisation.ScaleAsNumpy())
    operators = [operator for operator in graph.operators if operator.name not in ("RELU", "TANH")]
    unfused = {operator.index: operator for operator in reversed(graph.operators)}
    assert len(unfused) == expected.OperatorsLength() and operators
    for index in range(expected.OperatorsLength()):
        operator = expected.Operators(index)
        code = model.OperatorCodes(operator.OpcodeIndex())
        # BuiltinCode() returns the deprecated field where that is below 127, filled or not: look the new one up
        place = code._tab.Offset(10)
        new = code._tab.Get(Int32Flags, code._tab.Pos + place) if place else 0
        assert unfused[index].name == OPERATORS[max(new, code.DeprecatedBuiltinCode())]
        assert unfused[index].inputs == tuple(operator.InputsAsNumpy().tolist())


@pytest.mark.parametrize("new_codes_only", [False, True])
def test_operator_codes_of_old_and_new_writers(tmp_path, new_codes_only):
    builder = GraphBuilder()
    x = builder.tensor((2, 2))
    y = builder.op("DEQUANTIZE", x, shape=(2, 2))
    z = builder.op("BROADCAST_TO", y, [3, 2, 2], shape=(3, 2, 2))
    graph = read(write(tmp_path, builder.finish([x], [z], new_codes_only)))
    assert [operator.name for operator in graph.operators] == ["DEQUANTIZE", "BROADCAST_TO"]


@given(values=npst.arrays(np.int8, npst.array_shapes(max_dims=3, max_side=5)), outside=st.booleans(), data=st.data())
def test_quantised_constants_are_dequantised_as_defined(tmp_path_factory, values, outside, data):
    axis = data.draw(st.integers(0, values.ndim - 1))
    count = data.draw(st.sampled_from([1, values.shape[axis]]))
    scale = np.array(data.draw(st.lists(st.floats(0.0078125, 8, width=32), min_size=count, max_size=count)), np.float32)
    zero = np.array(data.draw(st.lists(st.integers(-128, 127), min_size=count, max_size=count)))
    builder = GraphBuilder()
    builder.constant(values, "i1", scale=scale, zero_point=zero, axis=axis, outside=outside)
    x = builder.tensor()
    path = write(tmp_path_factory.getbasetemp(), builder.finish([x], [x]))
    shape = [1] * values.ndim
    shape[axis] = count
    expected = (values.astype(np.int64) - zero.reshape(shape)).astype(np.float32) * scale.reshape(shape)
    np.testing.assert_array_equal(read(path).tensors[0].values(), expected)


@pytest.mark.parametrize("shape", [(4, 3), (5,), (1,), (2, 2, 2)])
def test_int4_has_the_low_nibble_first(tmp_path, shape):
    values = np.random.default_rng(1).integers(-8, 8, shape).astype(np.int8)
    flat = np.append(values.reshape(-1), np.zeros(values.size % 2, np.int8)).view(np.uint8) & 15
    builder = GraphBuilder()
    builder.tensor(shape, "INT4", (flat[::2] | flat[1::2] << 4).tobytes(), scale=[0.5])
    x = builder.tensor()
    found = read(write(tmp_path, builder.finish([x], [x]))).tensors[0]
    np.testing.assert_array_equal(found.raw(), values)
    np.testing.assert_array_equal(found.values(), values * np.float32(0.5))


def refusals():
    def custom(b, x):
        return b.op("CUSTOM:FlexErf", x)

    def variable(b, x):
        return b.op("ADD", x, b.tensor(variable=True))

    def resource(b, x):
        return b.op("ADD", x, b.op("VAR_HANDLE", kind="RESOURCE"))

    def sparse(b, x):
        return b.op("ADD", x, b.constant([1.0], sparse=True))

    named = {custom: "CUSTOM:FlexErf", variable: "ADD", sparse: "ADD", resource: "VAR_HANDLE"}
    return [(make, f"operator 0 {name}") for make, name in named.items()]


@pytest.mark.parametrize(("make", "named"), refusals(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_not_supported_is_refused_by_name_and_index(tmp_path, make, named):
    builder = GraphBuilder()
    x = builder.tensor()
    path = write(tmp_path, builder.finish([x], [make(builder, x)]))
    with pytest.raises(ExtractionError, match=named):
        Wiring(read(path)).refuse_unsupported()
    with pytest.raises(ExtractionError, match=named):
        extract(path, tmp_path / "model")
    assert named in inspect(path).problem


def damaged():
    builder = GraphBuilder()
    x = builder.tensor()
    builder.constant([1.0, 2.0])
    y = builder.op("RELU", x)
    good = builder.finish([x], [y])
    wide = GraphBuilder()
    a = wide.tensor((2**20, 2**20, 2))
    short = GraphBuilder()
    b = short.tensor((4,), data=b"12345678")
    unknown = GraphBuilder()
    c = unknown.tensor()
    late = GraphBuilder()
    d, e = late.tensor(), late.tensor()
    late.op("RELU", e)
    return {
        "too large": (wide.finish([a], [a]), "shape"),
        "short buffer": (short.finish([b], [b]), "needs 16 bytes"),
        "no such tensor": (unknown.finish([c], [7]), "does not exist"),
        "unwritten": (late.finish([d], [d]), "before anything writes it"),
        "cut": (good[:-20], "outside|no TFLite"),
        "a table at its end": (good[:4] + b"TFL3" + b"\xff" * 8, "outside"),
        "text": (b"this is not a model, it is a sentence", "no TFLite file"),
        "four bytes": (b"TFL3", "no TFLite file"),
        "nothing": (b"", "empty"),
    }


@pytest.mark.parametrize("name", damaged())
def test_damage_is_named(tmp_path, name):
    data, problem = damaged()[name]
    with pytest.raises(ExtractionError, match=problem):
        read(write(tmp_path, data))


def test_no_file_and_a_directory(tmp_path):
    with pytest.raises(ExtractionError, match="directory"):
        read(tmp_path)
    with pytest.raises(ExtractionError, match="cannot read"):
        read(tmp_path / "absent.tflite")
