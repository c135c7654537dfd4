"""Every stored export: exact weights, and a conditioner that gives what the interpreter and the graph itself give."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from extraction import ExtractionError, extract
from extraction.check import compare
from extraction.conditioners import recover
from extraction.evaluate import Evaluator
from extraction.extract import Tensors, config_of
from extraction.graph import Wiring
from extraction.schema import Tensor, read
from mlx_audio_native import load
from mlx_audio_native.weights import save

DATA = Path(__file__).parent.parent / "golden" / "data"
NAMES = sorted(path.stem for path in DATA.glob("*_*.tflite") if "demo" not in path.stem)
T5 = "conditioner.conditioners.prompt.model."
BIAS = T5 + "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
FLOAT32 = [name for name in NAMES if name.endswith("float32") and "half" not in name and "square" not in name]


@cache
def exported(name: str) -> SimpleNamespace:
    """A stored export, what was recovered from it, its source's weights, and the interpreter's inputs and outputs."""
    found = recover(Wiring(read(DATA / f"{name}.tflite")))
    with safe_open(DATA / f"{name}.safetensors", "np") as file:
        recorded, provenance = (
            {
                key: file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118
            },
            file.metadata(),
        )
    source = load_file(DATA / f"{provenance['source']}_source.safetensors")
    return SimpleNamespace(found=found, recorded=recorded, source=source, tensors=dict(Tensors(found)), name=name)


@cache
def encoded(name: str, folder: Path):
    """The runtime's output for the recorded inputs, from the extracted folder."""
    export = exported(name)
    extract(DATA / f"{name}.tflite", folder / name, check=False)
    conditioner = load(folder / name, parts=("conditioner",)).conditioner
    columns = {id_: export.recorded["numbers"][:, i] for i, id_ in enumerate(export.found.numbers)}
    with mx.stream(mx.cpu):
        result = conditioner.encode(export.recorded["input_ids"], export.recorded["attention_mask"], **columns)
        return {key: np.asarray(value) for key, value in result._asdict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("extracted")


def unreached(export, expected: np.ndarray) -> np.ndarray:
    """The relative bias with zeros where no input of the encoded length reaches it."""
    expected = expected.copy()
    expected[list(export.found.text.unreachable)] = 0
    return expected


def differing(export, expected: dict[str, np.ndarray]) -> list[str]:
    assert set(export.tensors) == set(expected)
    expected = {**expected, BIAS: unreached(export, expected[BIAS])}
    return [name for name, value in expected.items() if not np.array_equal(export.tensors[name], value)]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.endswith("float32") and not {"half", "folded"} & {*name.split("_")}]
)
def test_float32_weights_are_the_sources_bit_for_bit(name):
    export = exported(name)
    assert differing(export, export.source) == []
    assert all(value.dtype == np.float32 for value in export.tensors.values())


def in_half_precision(source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: np.float16(value) if key.startswith(T5) else value for key, value in source.items()}


def test_weights_traced_in_half_precision_are_the_sources_in_half_precision():
    export = exported("relu_onnx2tf_half_float32")
    assert differing(export, in_half_precision(export.source)) == []
    assert export.found.warnings == []


def test_scores_that_the_exporter_transposed_are_followed_and_told():
    """onnx2tf 1.29.24 put a transpose behind the 32 by 32 scores of the last block: the file computes k·qᵀ."""
    export = exported("gated_onnx2tf_half_float32")
    expected = in_half_precision(export.source)
    q, k = (f"{T5}encoder.block.2.layer.0.SelfAttention.{letter}.weight" for letter in "qk")
    expected[q], expected[k] = expected[k], expected[q]
    assert differing(export, expected) == []
    assert any("block 2 change places" in warning for warning in export.found.warnings)


def test_folded_gains_are_in_the_weights_and_recorded_as_one():
    export = exported("relu_folded_float32")
    expected = dict(export.source)
    for layer in range(2):
        for part, names in enumerate(
            (("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"), ("DenseReluDense.wi",))
        ):
            prefix = f"{T5}encoder.block.{layer}.layer.{part}."
            gain = expected[prefix + "layer_norm.weight"]
            expected[prefix + "layer_norm.weight"] = np.ones_like(gain)
            for weight in names:
                expected[f"{prefix}{weight}.weight"] = expected[f"{prefix}{weight}.weight"] * gain
    seconds = "conditioner.conditioners.seconds_total.embedder.embedding.0.weights"
    expected[seconds] = (expected[seconds] * np.float32(2)) * np.float32(np.pi)
    assert differing(export, expected) == []
    assert export.found.numbers["seconds_total"].angle_constants == ()


@pytest.mark.parametrize("name", [name for name in NAMES if "float16" in name or "int" in name])
def test_other_weights_are_the_files_own_dequantised(name):
    """Every row of a recovered matrix is, exactly, a row of some constant of the file by its own scales."""
    export = exported(name)
    rows = set()
    for tensor in export.found.wiring.graph.tensors:
        if tensor.data is not None and len(tensor.shape) >= 2 and tensor.type in ("FLOAT32", "FLOAT16", "INT8", "INT4"):
            rows |= {row.tobytes() for row in by_hand(tensor)}
    for key, value in export.tensors.items():
        if value.ndim == 2 and not (key == BIAS and export.found.text.unreachable):
            missing = [row for row in value if row.astype(np.float32).tobytes() not in rows]
            assert not missing, key


def by_hand(tensor: Tensor) -> np.ndarray:
    stored = np.frombuffer(tensor.data, {"FLOAT32": "f4", "FLOAT16": "f2", "INT8": "i1", "INT4": "u1"}[tensor.type])
    if tensor.type == "INT4":
        nibbles = [int(nibble) - 16 * (nibble > 7) for byte in stored for nibble in (byte & 15, byte >> 4)]
        stored = np.array(nibbles[: tensor.shape[0] * tensor.shape[1]])
    values = stored.reshape(tensor.shape[0], -1).astype(np.float32)
    if tensor.quantization is not None:
        assert tensor.quantization.axis == 0 and not tensor.quantization.zero_point.any()
        values = values * tensor.quantization.scale.reshape(-1, 1)
    return np.ascontiguousarray(values.reshape(-1, tensor.shape[-1]))


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_files_agree_with_the_interpreter(name, folder):
    export, result = exported(name), encoded(name, folder)
    count, expected = export.found.max_length, export.recorded
    assert difference(result["cross_attention"][:, :count], expected["cross_attention"][:, :count]) <= 5e-6
    assert difference(result["cross_attention"][:, count:], expected["cross_attention"][:, count:]) <= 1e-6
    assert difference(result["global_cond"], expected["global_cond"]) <= 1e-6
    np.testing.assert_array_equal(result["mask"], expected["mask"])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FLOAT32])
def test_other_files_agree_with_a_float64_evaluation_of_themselves(name, folder):
    export, result = exported(name), encoded(name, folder)
    found, recorded = export.found, export.recorded
    graph, evaluator = found.wiring.graph, Evaluator(found.wiring)
    count, text_bound = found.max_length, 1e-4 if found.text.half_gelu else 1e-5
    assert found.text.half_gelu == (name.startswith("gated_onnx2tf") and ("half" in name or "float16" in name))
    for row in range(len(recorded["input_ids"])):
        feeds = {found.text.ids: recorded["input_ids"][row], found.text.mask: recorded["attention_mask"][row]}
        feeds |= {number.input: recorded["numbers"][row, i] for i, number in enumerate(found.numbers.values())}
        feeds = {index: np.reshape(value, graph.tensors[index].shape) for index, value in feeds.items()}
        cross, global_ = evaluator.run(feeds, [found.cross, found.global_])
        assert difference(result["global_cond"][row], global_.reshape(-1)) <= 2e-6
        assert difference(result["cross_attention"][row, count:], cross[0, count:]) <= 2e-6
        states = result["cross_attention"][row, :count]
        if found.masking == "channels":
            # the export's own fault, on real tokens: channels are cut where tokens should be
            real = int(recorded["attention_mask"][row].sum())
            states, cross = (states * recorded["attention_mask"][row, :count])[:real], cross[:, :real]
        assert difference(states, cross[0, : len(states)]) <= text_bound


def test_mlx_runs_the_whole_graph_as_numpy_does():
    export = exported("gated_litert_float32")
    wiring, recorded = export.found.wiring, export.recorded
    feeds = {export.found.text.ids: recorded["input_ids"][1:2], export.found.text.mask: recorded["attention_mask"][1:2]}
    feeds |= {number.input: recorded["numbers"][1, i : i + 1] for i, number in enumerate(export.found.numbers.values())}
    with mx.stream(mx.cpu):
        actual = Evaluator(wiring, mx, "float32").run(feeds, wiring.graph.outputs)
    for found, expected in zip(actual, Evaluator(wiring).run(feeds, wiring.graph.outputs), strict=True):
        assert difference(np.asarray(found), expected) <= 5e-6


def test_a_mask_over_channels_is_told():
    (warning,) = exported("square_onnx2tf_float32").found.warnings
    assert "mask" in warning and "channels" in warning
    assert not exported("relu_onnx2tf_float32").found.warnings


def test_buckets_that_no_input_reaches_are_named(folder):
    assert exported("relu_litert_float32").found.text.unreachable == ()
    assert exported("relu_onnx2tf_float32").found.text.unreachable == (16,)
    report = extract(DATA / "relu_folded_float32.tflite", folder / "folded")
    assert any("buckets 16 could not be recovered" in note and "128 tokens" in note for note in report.notes)


def test_sizes_and_names_come_from_the_graph():
    found = exported("gated_onnx2tf_float32").found
    sizes = {"vocab_size": 80, "d_model": 36, "d_kv": 8, "num_heads": 5, "num_layers": 3, "d_ff": 56}
    assert found.text.config.items() >= {**sizes, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}.items()
    assert (found.text.encode_length, found.max_length, found.cond_dim) == (32, 16, 28)
    assert list(found.numbers) == ["seconds_start", "seconds_total"]
    assert [(number.min, number.max) for number in found.numbers.values()] == [(1, 512), (0, 512)]
    order = exported("order_litert_float32").found.numbers["seconds_total"]
    assert order.features == ("cos", "sin", "x") and len(order.frequencies) == 16


@pytest.mark.parametrize(
    ("broken", "where"),
    [
        (T5 + "encoder.block.1.layer.0.SelfAttention.o.weight", "text of 1 tokens"),
        (BIAS, "text of "),
        ("conditioner.conditioners.prompt.proj_out.bias", "text of 1 tokens"),
        ("conditioner.conditioners.seconds_start.embedder.embedding.0.weights", "seconds "),
        ("conditioner.conditioners.seconds_total.embedder.embedding.1.weight", "seconds "),
    ],
)
def test_the_check_sees_a_tensor_that_is_one_thousandth_off(tmp_path, broken, where):
    export = exported("gated_litert_float32")
    tensors = {**export.tensors, broken: export.tensors[broken] * np.float32(1.001)}
    save(tmp_path / "model", config_of(export.found), tensors)
    with pytest.raises(ExtractionError, match=f"disagrees with the graph: {where}"):
        compare(export.found, tmp_path / "model")


def test_the_check_sees_a_formula_that_is_not_the_graphs(tmp_path):
    export = exported("gated_litert_float32")
    config = json.loads(json.dumps(config_of(export.found)))
    config["model"]["conditioning"]["configs"][2]["config"]["features"] = ["x", "cos", "sin"]
    save(tmp_path / "model", config, export.tensors)
    with pytest.raises(ExtractionError, match="disagrees with the graph: seconds"):
        compare(export.found, tmp_path / "model")
