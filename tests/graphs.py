"""Small TFLite files made by hand, operator by operator, for what no exporter at hand writes."""

from typing import Any

import flatbuffers
import numpy as np
import tflite

TYPES = {
    **{np.dtype("f4"): "FLOAT32", np.dtype("f2"): "FLOAT16", np.dtype("i4"): "INT32", np.dtype("i8"): "INT64"},
    **{np.dtype("i1"): "INT8", np.dtype("?"): "BOOL", np.dtype("u1"): "UINT8"},
}
# options of an operator: its table, and what sets a field of it
OPTIONS = {
    **{name: name.capitalize() for name in ("ADD", "SUB", "MUL", "DIV")},
    **{"FULLY_CONNECTED": "FullyConnected", "BATCH_MATMUL": "BatchMatMul", "CONCATENATION": "Concatenation"},
    **{"SOFTMAX": "Softmax", "GATHER": "Gather", "MEAN": "Reducer", "SUM": "Reducer", "STRIDED_SLICE": "StridedSlice"},
    **{
        "PACK": "Pack",
        "ONE_HOT": "OneHot",
        "UNPACK": "Unpack",
        "CONV_2D": "Conv2D",
        "TRANSPOSE_CONV": "TransposeConv",
        "SQUEEZE": "Squeeze",
        "GELU": "Gelu",
        "RESHAPE": "Reshape",
    },
}


class GraphBuilder:
    """Collects tensors and operators; `finish` gives the file's bytes. Tensors are known by their index."""

    def __init__(self) -> None:
        self.tensors: list[dict[str, Any]] = []
        self.operators: list[dict[str, Any]] = []

    def tensor(self, shape=(1,), kind="FLOAT32", data: bytes | None = None, **more: Any) -> int:
        """`more`: scale, zero_point and axis of a quantisation; variable; sparse; outside (by offset and size)."""
        self.tensors.append({"shape": shape, "kind": kind, "data": data, **more})
        return len(self.tensors) - 1

    def constant(self, values: Any, dtype: str = "f4", **more: Any) -> int:
        array = np.asarray(values, dtype)
        return self.tensor(array.shape, TYPES[array.dtype], array.tobytes(), **more)

    def op(self, name: str, *inputs: Any, shape=(1,), kind="FLOAT32", outputs=1, **options: Any) -> int:
        """Adds an operator and its outputs; returns the first output. Inputs that are no tensor become constants."""
        given = [
            x if type(x) is int else self.constant(x, "i4" if np.asarray(x).dtype.kind == "i" else "f4") for x in inputs
        ]
        made = [self.tensor(shape, kind) for _ in range(outputs)]
        self.operators.append({"name": name, "inputs": given, "outputs": made, "options": options})
        return made[0]

    def finish(self, inputs: list[int], outputs: list[int], new_codes_only: bool = False) -> bytes:
        builder = flatbuffers.Builder(1024)
        buffers, outside = [b""], []
        places = []
        for tensor in self.tensors:
            places.append(0)
            if tensor["data"] is not None:
                places[-1] = len(buffers)
                buffers.append(tensor["data"] if not tensor.get("outside") else b"")
                outside.append((len(buffers) - 1, tensor["data"]) if tensor.get("outside") else None)
        moved = dict(item for item in outside if item)
        names = list(dict.fromkeys(operator["name"] for operator in self.operators))
        # offsets of outside data are known only once the table is: build twice
        data = self._build(
            builder, names, buffers, places, inputs, outputs, new_codes_only, dict.fromkeys(moved, (2, 1))
        )
        if moved:
            where, end = {}, len(data)
            for index, content in moved.items():
                where[index] = end, len(content)
                end += len(content)
            builder = flatbuffers.Builder(1024)
            data = self._build(builder, names, buffers, places, inputs, outputs, new_codes_only, where)
            data += b"".join(moved.values())
        return data

    def _build(self, b, names, buffers, places, inputs, outputs, new_codes_only, moved) -> bytes:
        def vector(values, size, add):
            b.StartVector(size, len(values), 8)
            for value in reversed(values):
                add(value)
            return b.EndVector()

        def ints(values):
            return vector(list(values), 4, b.PrependInt32)

        def tables(offsets):
            return vector(offsets, 4, b.PrependUOffsetTRelative)

        buffer_offsets = []
        for index, content in enumerate(buffers):
            content_offset = b.CreateByteVector(content) if content else None
            tflite.BufferStart(b)
            if content_offset is not None:
                tflite.BufferAddData(b, content_offset)
            if index in moved:
                tflite.BufferAddOffset(b, moved[index][0])
                tflite.BufferAddSize(b, moved[index][1])
            buffer_offsets.append(tflite.BufferEnd(b))
        tensor_offsets = [
            self._tensor(b, t, place, ints, vector) for t, place in zip(self.tensors, places, strict=True)
        ]
        operator_offsets = [self._operator(b, operator, names, ints) for operator in self.operators]
        codes = []
        for name in names:
            custom = b.CreateString(name[7:]) if name.startswith("CUSTOM:") else None
            code = getattr(tflite.BuiltinOperator, "CUSTOM" if custom else name)
            tflite.OperatorCodeStart(b)
            tflite.OperatorCodeAddDeprecatedBuiltinCode(b, 0 if new_codes_only else min(code, 127))
            tflite.OperatorCodeAddBuiltinCode(b, code)
            if custom:
                tflite.OperatorCodeAddCustomCode(b, custom)
            codes.append(tflite.OperatorCodeEnd(b))
        parts = [tables(tensor_offsets), ints(inputs), ints(outputs), tables(operator_offsets)]
        tflite.SubGraphStart(b)
        tflite.SubGraphAddTensors(b, parts[0])
        tflite.SubGraphAddInputs(b, parts[1])
        tflite.SubGraphAddOutputs(b, parts[2])
        tflite.SubGraphAddOperators(b, parts[3])
        subgraph = tflite.SubGraphEnd(b)
        parts = [tables(codes), tables([subgraph]), b.CreateString("made by hand"), tables(buffer_offsets)]
        tflite.ModelStart(b)
        tflite.ModelAddVersion(b, 3)
        tflite.ModelAddOperatorCodes(b, parts[0])
        tflite.ModelAddSubgraphs(b, parts[1])
        tflite.ModelAddDescription(b, parts[2])
        tflite.ModelAddBuffers(b, parts[3])
        b.Finish(tflite.ModelEnd(b), b"TFL3")
        return bytes(b.Output())

    @staticmethod
    def _tensor(b, tensor, place, ints, vector):
        shape, name = ints(tensor["shape"]), b.CreateString("t")
        quantisation = sparsity = None
        if "scale" in tensor:
            scales = vector(np.atleast_1d(tensor["scale"]).tolist(), 4, b.PrependFloat32)
            zeros = vector(np.atleast_1d(tensor.get("zero_point", 0)).tolist(), 8, b.PrependInt64)
            tflite.QuantizationParametersStart(b)
            tflite.QuantizationParametersAddScale(b, scales)
            tflite.QuantizationParametersAddZeroPoint(b, zeros)
            tflite.QuantizationParametersAddQuantizedDimension(b, tensor.get("axis", 0))
            quantisation = tflite.QuantizationParametersEnd(b)
        if tensor.get("sparse"):
            tflite.SparsityParametersStart(b)
            sparsity = tflite.SparsityParametersEnd(b)
        tflite.TensorStart(b)
        tflite.TensorAddShape(b, shape)
        tflite.TensorAddType(b, getattr(tflite.TensorType, tensor["kind"]))
        tflite.TensorAddBuffer(b, place)
        tflite.TensorAddName(b, name)
        if quantisation is not None:
            tflite.TensorAddQuantization(b, quantisation)
        if sparsity is not None:
            tflite.TensorAddSparsity(b, sparsity)
        if tensor.get("variable"):
            tflite.TensorAddIsVariable(b, True)
        return tflite.TensorEnd(b)

    @staticmethod
    def _operator(b, operator, names, ints):
        inputs, outputs, table = ints(operator["inputs"]), ints(operator["outputs"]), OPTIONS.get(operator["name"])
        options = None
        if table:
            vectors = {key: ints(value) for key, value in operator["options"].items() if isinstance(value, tuple)}
            getattr(tflite, f"{table}OptionsStart")(b)
            for key, value in {**operator["options"], **vectors}.items():
                getattr(tflite, f"{table}OptionsAdd{key}")(b, value)
            options = getattr(tflite, f"{table}OptionsEnd")(b)
        tflite.OperatorStart(b)
        tflite.OperatorAddOpcodeIndex(b, names.index(operator["name"]))
        tflite.OperatorAddInputs(b, inputs)
        tflite.OperatorAddOutputs(b, outputs)
        if options is not None:
            tflite.OperatorAddBuiltinOptionsType(b, getattr(tflite.BuiltinOptions, f"{table}Options"))
            tflite.OperatorAddBuiltinOptions(b, options)
        return tflite.OperatorEnd(b)
