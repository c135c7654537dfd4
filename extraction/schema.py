"""The parts of TFLite's schema that a graph needs, as typed and frozen values: `read` turns a file into a Graph.

Field numbers are slots in the order of schema.fbs; the names of operators, types and option tables come from the
`tflite` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import tflite

from .errors import ExtractionError
from .flatbuffer import File, Table

OPERATORS = {value: name for name, value in vars(tflite.BuiltinOperator).items() if isinstance(value, int)}
TYPES = {value: name for name, value in vars(tflite.TensorType).items() if isinstance(value, int)}
ACTIVATIONS = {value: name for name, value in vars(tflite.ActivationFunctionType).items() if isinstance(value, int)}
_OPTION_TABLES = {value: name for name, value in vars(tflite.BuiltinOptions).items() if isinstance(value, int)}

# INT4 holds two values a byte; the types that are not here hold no numbers that a formula could use
DTYPES = {
    **{"FLOAT32": "<f4", "FLOAT16": "<f2", "FLOAT64": "<f8", "INT4": "i1", "INT8": "i1", "INT16": "<i2"},
    **{"INT32": "<i4", "INT64": "<i8", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "BOOL": "?"},
}
FLOATS = ("FLOAT32", "FLOAT16", "FLOAT64")

_MOST_RANK = 8
_MOST_ELEMENTS = 2**40
_MOST_TENSORS = 2**17
_MOST_OPERATORS = 2**15
_MOST_OPERANDS = 2**18

_FUSED = {"activation": (0, "b", 0)}
_AXIS = {"axis": (0, "i", 0)}
_REDUCER = {"keep_dims": (0, "?", False)}
# operator → its option table's name, and option → slot, struct code ("v" is a vector of int32), default
_OPTIONS: dict[str, tuple[str, dict[str, tuple[int, str, object]]]] = {
    "ADD": ("AddOptions", _FUSED),
    "SUB": ("SubOptions", _FUSED),
    "MUL": ("MulOptions", _FUSED),
    "DIV": ("DivOptions", _FUSED),
    "FULLY_CONNECTED": (
        "FullyConnectedOptions",
        {**_FUSED, "weights_format": (1, "b", 0), "keep_num_dims": (2, "?", False)},
    ),
    "CONV_2D": (
        "Conv2DOptions",
        {
            **{"padding": (0, "b", 0), "stride_w": (1, "i", 0), "stride_h": (2, "i", 0), "activation": (3, "b", 0)},
            **{"dilation_w": (4, "i", 1), "dilation_h": (5, "i", 1)},
        },
    ),
    "TRANSPOSE_CONV": (
        "TransposeConvOptions",
        {"padding": (0, "b", 0), "stride_w": (1, "i", 0), "stride_h": (2, "i", 0), "activation": (3, "b", 0)},
    ),
    "BATCH_MATMUL": ("BatchMatMulOptions", {"adj_x": (0, "?", False), "adj_y": (1, "?", False)}),
    "CONCATENATION": ("ConcatenationOptions", {**_AXIS, "activation": (1, "b", 0)}),
    "RESHAPE": ("ReshapeOptions", {"new_shape": (0, "v", None)}),
    "SQUEEZE": ("SqueezeOptions", {"squeeze_dims": (0, "v", None)}),
    "SOFTMAX": ("SoftmaxOptions", {"beta": (0, "f", 0.0)}),
    "GATHER": ("GatherOptions", {**_AXIS, "batch_dims": (1, "i", 0)}),
    "PACK": ("PackOptions", {"axis": (1, "i", 0)}),
    "UNPACK": ("UnpackOptions", {"axis": (1, "i", 0)}),
    "SPLIT": ("SplitOptions", {}),
    "SPLIT_V": ("SplitVOptions", {}),
    "GELU": ("GeluOptions", {"approximate": (0, "?", False)}),
    "LEAKY_RELU": ("LeakyReluOptions", {"alpha": (0, "f", 0.0)}),
    "CUMSUM": ("CumsumOptions", {"exclusive": (0, "?", False), "reverse": (1, "?", False)}),
    "ONE_HOT": ("OneHotOptions", _AXIS),
    "STRIDED_SLICE": (
        "StridedSliceOptions",
        {
            **{"begin_mask": (0, "i", 0), "end_mask": (1, "i", 0), "ellipsis_mask": (2, "i", 0)},
            **{"new_axis_mask": (3, "i", 0), "shrink_axis_mask": (4, "i", 0), "offset": (5, "?", False)},
        },
    ),
    **dict.fromkeys(("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD"), ("ReducerOptions", _REDUCER)),
    **dict.fromkeys(("REDUCE_ANY", "REDUCE_ALL"), ("ReducerOptions", _REDUCER)),
}


@dataclass(frozen=True)
class Quantization:
    """real = scale · (stored - zero_point), one pair for the tensor or one per index of `axis`."""

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int


@dataclass(frozen=True)
class Tensor:
    """`data` is the constant's bytes in the file, or None for a tensor that is computed or fed."""

    index: int
    name: str
    shape: tuple[int, ...]
    type: str
    data: memoryview | None
    quantization: Quantization | None

    def raw(self) -> np.ndarray:
        """A constant as it is stored, a view on the file (int4 unpacked to int8)."""
        if self.data is None or self.type not in DTYPES:
            raise ExtractionError(f"tensor {self.index} ({self.type}) holds no numbers")
        if self.type == "INT4":
            packed = np.frombuffer(self.data, np.int8)
            # the low nibble comes first; shifting an int8 back down brings its sign along
            return np.stack([packed << 4, packed], -1).reshape(-1)[: prod(self.shape)].reshape(self.shape) >> 4
        return np.frombuffer(self.data, DTYPES[self.type]).reshape(self.shape)

    def values(self) -> np.ndarray:
        """A constant as numbers: float16 stays float16, which is exact; what is quantised becomes float32."""
        return self.raw() if self.quantization is None else dequantise(self.raw(), self.quantization)


def dequantise(stored: np.ndarray, quantization: Quantization) -> np.ndarray:
    """float32 of scale · (stored - zero_point), in the order and precision of TFLite's DEQUANTIZE."""
    scale, zero = quantization.scale, quantization.zero_point
    if scale.size > 1:
        shape = [1] * stored.ndim
        shape[quantization.axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    if not zero.any():
        return stored.astype(np.float32) * scale
    return (stored.astype(np.int64) - zero).astype(np.float32) * scale


@dataclass(frozen=True)
class Operator:
    """An input of -1 is absent. `options` holds plain numbers; a fused activation is an operator of its own."""

    index: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, object]

    def __str__(self) -> str:
        return f"operator {self.index} {self.name}"


@dataclass(frozen=True)
class Graph:
    """The file's first subgraph, and the file's size in bytes. Operators stand in an order of execution."""

    path: Path
    size: int
    description: str
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def read(path: Path | str) -> Graph:
    """Parse and check a TFLite file; constants stay in the file until they are asked for. Raises ExtractionError."""
    file = File(path)
    model = file.root()
    codes = [_code(table) for table in model.tables(1, _MOST_OPERATORS)]
    subgraphs = model.tables(2, _MOST_OPERATORS)
    buffers = model.tables(4, _MOST_TENSORS)
    if not subgraphs:
        raise ExtractionError(f"{file.path} holds no graph")
    subgraph = subgraphs[0]
    tables = subgraph.tables(0, _MOST_TENSORS)
    tensors = [_tensor(file, index, table, buffers) for index, table in enumerate(tables)]
    budget = [_MOST_OPERANDS]
    operators: list[Operator] = []
    for index, table in enumerate(subgraph.tables(3, _MOST_OPERATORS)):
        operator, activation = _operator(file, index, table, codes, len(tensors), budget)
        if activation != "NONE":
            operators += _unfused(operator, activation, tensors)
        else:
            operators.append(operator)
    inputs = _indices(file, "the graph's inputs", subgraph.vector(1, "<i4"), len(tensors), budget)
    outputs = _indices(file, "the graph's outputs", subgraph.vector(2, "<i4"), len(tensors), budget)
    description = bytes(model.bytes(3)[:200]).decode("utf-8", "replace")
    graph = Graph(file.path, file.size, description, tuple(tensors), tuple(operators), inputs, outputs)
    _check_order(graph)
    return graph


def _code(table: Table) -> str:
    # old files fill the deprecated byte only, some writers the new field only; the larger of the two is the operator
    code = max(int(table.scalar(0, "b")), int(table.scalar(3, "i")))
    name = OPERATORS.get(code, f"OPERATOR_{code}")
    if name == "CUSTOM":
        return f"CUSTOM:{bytes(table.bytes(1)[:60]).decode('utf-8', 'replace')}"
    return name


def _tensor(file: File, index: int, table: Table, buffers: list[Table]) -> Tensor:
    where = f"{file.path}: tensor {index}"
    shape = tuple(int(size) for size in table.vector(0, "<i4")[: _MOST_RANK + 1])
    if len(shape) > _MOST_RANK or any(size < 0 for size in shape) or prod(shape) > _MOST_ELEMENTS:
        raise ExtractionError(f"{where} has the shape {list(shape)}, which cannot be")
    code = int(table.scalar(1, "b"))
    kind = TYPES.get(code, f"TYPE_{code}")
    buffer = int(table.scalar(2, "I"))
    if buffer >= len(buffers):
        raise ExtractionError(f"{where} points to buffer {buffer} of {len(buffers)}")
    # buffer 0 is the empty one by convention
    data = _buffer(file, buffers[buffer]) if buffer else None
    if data is not None and (table.scalar(5, "?") or table.table(6) is not None):
        data, kind = None, "VARIABLE" if table.scalar(5, "?") else "SPARSE"
    if data is not None and kind in DTYPES:
        items = prod(shape)
        expected = (items + 1) // 2 if kind == "INT4" else items * np.dtype(DTYPES[kind]).itemsize
        if len(data) != expected:
            raise ExtractionError(f"{where} of {kind} {list(shape)} needs {expected} bytes, its buffer has {len(data)}")
    elif table.scalar(5, "?"):
        kind = "VARIABLE"
    name = bytes(table.bytes(3)[:200]).decode("utf-8", "replace")
    return Tensor(index, name, shape, kind, data, _quantization(where, table.table(4), shape, kind))


def _buffer(file: File, table: Table) -> memoryview | None:
    data = table.bytes(0)
    if len(data):
        return data
    offset, size = int(table.scalar(1, "Q")), int(table.scalar(2, "Q"))
    # an offset of 0 or 1 is a placeholder; large and quantised constants lie outside the table
    return file.span(offset, size) if offset > 1 and size else None


def _quantization(where: str, table: Table | None, shape: tuple[int, ...], kind: str) -> Quantization | None:
    if table is None or kind in FLOATS:
        return None
    scale, zero, axis = table.vector(2, "<f4"), table.vector(3, "<i8"), int(table.scalar(6, "i"))
    if int(table.scalar(4, "B")):
        raise ExtractionError(f"{where} is quantised in a way of its own, which is not supported")
    if not len(scale):
        return None
    if len(zero) != len(scale):
        # writers may leave out zero points that are all 0, or give one for all channels
        if len(zero) > 1:
            raise ExtractionError(f"{where} has {len(scale)} scales and {len(zero)} zero points")
        zero = np.full(len(scale), zero[0] if len(zero) else 0, np.int64)
    if len(scale) > 1 and not (0 <= axis < len(shape) and len(scale) == shape[axis]):
        raise ExtractionError(f"{where} of shape {list(shape)} has {len(scale)} scales along axis {axis}")
    if not np.isfinite(scale).all():
        raise ExtractionError(f"{where} has a scale that is not finite")
    return Quantization(scale, zero, axis)


def _indices(file: File, where: str, vector: np.ndarray, count: int, budget: list[int]) -> tuple[int, ...]:
    budget[0] -= len(vector)
    if budget[0] < 0:
        raise ExtractionError(f"{file.path} lists more than {_MOST_OPERANDS} operands")
    if len(vector) and (vector.min() < -1 or vector.max() >= count):
        raise ExtractionError(f"{file.path}: {where} name a tensor that does not exist ({count} do)")
    return tuple(vector.tolist())


def _operator(
    file: File, index: int, table: Table, codes: list[str], count: int, budget: list[int]
) -> tuple[Operator, str]:
    code = int(table.scalar(0, "I"))
    if code >= len(codes):
        raise ExtractionError(f"{file.path}: operator {index} has code {code} of {len(codes)}")
    name = codes[code]
    where = f"the operands of operator {index} {name}"
    inputs = _indices(file, where, table.vector(1, "<i4"), count, budget)
    outputs = _indices(file, where, table.vector(2, "<i4"), count, budget)
    options = _options(file, f"operator {index} {name}", name, table)
    activation = ACTIVATIONS.get(options.pop("activation", 0), "unknown")
    if activation not in ("NONE", "RELU", "RELU_N1_TO_1", "RELU6", "TANH"):
        raise ExtractionError(f"{file.path}: operator {index} {name} has a fused activation that is not supported")
    if -1 in outputs or not outputs:
        raise ExtractionError(f"{file.path}: operator {index} {name} has no output")
    return Operator(index, name, inputs, outputs, options), activation


def _options(file: File, where: str, name: str, table: Table) -> dict[str, object]:
    expected, fields = _OPTIONS.get(name, ("", {}))
    kind = _OPTION_TABLES.get(int(table.scalar(3, "B")), "unknown")
    options = table.table(4) if expected and kind != "NONE" else None
    if options is not None and kind != expected:
        raise ExtractionError(f"{file.path}: {where} carries {kind}, not {expected}")
    values: dict[str, object] = {}
    for option, (slot, code, default) in fields.items():
        if options is None:
            values[option] = default
        elif code == "v":
            vector = options.vector(slot, "<i4")
            values[option] = tuple(vector[: _MOST_RANK + 1].tolist()) if len(vector) else None
        else:
            values[option] = options.scalar(slot, code, default)
    return values


def _unfused(operator: Operator, activation: str, tensors: list[Tensor]) -> list[Operator]:
    """The operator with a new tensor as output, and its activation as a second operator that writes the old one."""
    output = tensors[operator.outputs[0]]
    between = Tensor(len(tensors), output.name, output.shape, output.type, None, None)
    tensors.append(between)
    first = Operator(operator.index, operator.name, operator.inputs, (between.index,), operator.options)
    return [first, Operator(operator.index, activation, (between.index,), operator.outputs, {})]


def _check_order(graph: Graph) -> None:
    known = {tensor.index for tensor in graph.tensors if tensor.data is not None}
    known.update(graph.inputs)
    for operator in graph.operators:
        for index in operator.inputs:
            if index != -1 and index not in known and graph.tensors[index].type not in ("VARIABLE", "SPARSE"):
                raise ExtractionError(f"{graph.path}: {operator} uses tensor {index} before anything writes it")
        for index in operator.outputs:
            if index in known:
                raise ExtractionError(f"{graph.path}: {operator} writes tensor {index} a second time")
            known.add(index)
    for index in graph.outputs:
        if index not in known:
            raise ExtractionError(f"{graph.path}: nothing writes output tensor {index}")
