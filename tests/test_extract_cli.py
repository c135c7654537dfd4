"""The commands extract and inspect, and how a model folder appears."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from graphs import GraphBuilder

from mlx_audio_native import load
from mlx_audio_native.cli import main

DATA = Path(__file__).parent.parent / "golden" / "data"
FILE = DATA / "order_litert_float32.tflite"


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_extract_writes_a_conditioner_that_loads(capsys, tmp_path):
    status, out, err = run(capsys, "extract", FILE, "--output", tmp_path / "model")
    assert (status, err) == (0, "")
    assert "seconds_total: (clip(s, 1, 48) - 1)·0.0212765951 → [cos(x·w·2·π), sin(x·w·2·π), x] @ Wᵀ + b" in out
    assert "differs from the graph by" in out
    assert {item.name for item in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    conditioner = load(tmp_path / "model", parts=("conditioner",)).conditioner
    assert conditioner.encode([[5, 1]], [[1, 1]], seconds_total=[10.0]).cross_attention.shape == (1, 25, 20)
    assert {item.name for item in tmp_path.iterdir()} == {"model"}


def test_an_existing_folder_is_kept_unless_told_otherwise(capsys, tmp_path):
    output = tmp_path / "model"
    assert run(capsys, "extract", FILE, "--output", output, "--no-check")[0] == 0
    before = (output / "model.safetensors").read_bytes()
    other = DATA / "square_onnx2tf_float32.tflite"
    status, _, err = run(capsys, "extract", other, "--output", output)
    assert status == 1 and "exists already" in err and (output / "model.safetensors").read_bytes() == before
    assert run(capsys, "extract", other, "--output", output, "--overwrite")[0] == 0
    assert (output / "model.safetensors").read_bytes() != before
    (output / "precious.wav").write_bytes(b"mine")
    status, _, err = run(capsys, "extract", other, "--output", output, "--overwrite")
    assert status == 1 and "precious.wav" in err and (output / "precious.wav").exists()
    assert {item.name for item in tmp_path.iterdir()} == {"model"}


def test_the_same_file_gives_the_same_folder(capsys, tmp_path):
    for name in ("one", "two"):
        assert run(capsys, "extract", FILE, "--output", tmp_path / name)[0] == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_tokenizer_goes_along_if_it_fits(capsys, tmp_path):
    spiece = tmp_path / "spiece.model"
    spiece.write_bytes(b"no sentencepiece model")
    status, _, err = run(capsys, "extract", FILE, "--output", tmp_path / "model", "--tokenizer", spiece)
    assert status == 1 and "spiece.model" in err and not (tmp_path / "model").exists()


@pytest.mark.parametrize("command", ["extract", "inspect"])
@pytest.mark.parametrize("name", ["empty", "text", "directory", "absent", "cut"])
def test_what_is_no_tflite_file_ends_in_one_line(capsys, tmp_path, command, name):
    path = tmp_path / name
    if name == "directory":
        path.mkdir()
    elif name != "absent":
        path.write_bytes({"empty": b"", "text": b"not a model at all", "cut": FILE.read_bytes()[:5000]}[name])
    arguments = ["--output", tmp_path / "model"] if command == "extract" else []
    status, out, err = run(capsys, command, path, *arguments)
    assert (status, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "model").exists()


def dit_like(tmp_path: Path) -> Path:
    """A DiT as it looks when it was exported by position: its last input reaches nothing."""
    b = GraphBuilder()
    latents, t, cross, global_ = b.tensor((1, 4)), b.tensor((1,)), b.tensor((1, 4)), b.tensor((1, 4))
    velocity = b.op("FULLY_CONNECTED", b.op("ADD", latents, cross, shape=(1, 4)), np.eye(4), -1, shape=(1, 4))
    path = tmp_path / "dit.tflite"
    path.write_bytes(
        b.finish([latents, t, cross, global_], [b.op("ADD", velocity, b.op("COS", t), shape=(1, 4)), cross])
    )
    return path


def test_inspect_tells_of_lost_inputs_in_any_graph(capsys, tmp_path):
    status, out, _ = run(capsys, "inspect", dit_like(tmp_path))
    assert status == 0 and "no conditioners: 0 token lookups found" in out
    assert "warning: input 3 (FLOAT32 [1, 4], 't') feeds no operator" in out
    assert "output 1 (FLOAT32 [1, 4], 't') does not depend on input 0" in out
    assert "2 ADD" in out and "1 FULLY_CONNECTED" in out
    status, _, err = run(capsys, "extract", dit_like(tmp_path), "--output", tmp_path / "model")
    assert status == 1 and "no" not in {item.name for item in tmp_path.iterdir()} and "token lookups" in err


def test_inspect_as_json(capsys):
    status, out, _ = run(capsys, "inspect", "--json", DATA / "gated_onnx2tf_half_float32.tflite")
    report = json.loads(out)
    assert status == 0 and len(report["sha256"]) == 64 and report["bytes"] == 278628
    found = report["conditioners"]
    assert found["numbers"]["seconds_total"]["formula"].startswith("clip(s, 0, 512)·0.001953125 → [x, sin(")
    assert (
        found["precision"] == "float32"
        and found["half_precision_gelu"]
        and found["global"] == ["seconds_start", "seconds_total"]
    )
    assert report["operators"]["BATCH_MATMUL"] == 6 and any("GELU" in note for note in report["notes"])


def test_a_lost_global_conditioning_is_told(capsys, tmp_path):
    """The stored export with its global output taken out of the graph's list of outputs."""
    data = bytearray(FILE.read_bytes())
    from extraction.schema import read

    outputs = read(FILE).outputs
    listed = b"".join(value.to_bytes(4, "little") for value in (len(outputs), *outputs))
    at = data.find(listed)
    assert at > 0 and data.count(listed) == 1
    data[at + 12 : at + 16] = outputs[1].to_bytes(4, "little")
    path = tmp_path / "lost.tflite"
    path.write_bytes(bytes(data))
    status, out, err = run(capsys, "extract", path, "--output", tmp_path / "model")
    assert status == 0 and "warning: no output depends on the seconds alone" in out, err


def test_a_formula_that_is_not_the_runtimes_shows_its_operators(capsys, tmp_path):
    """The stored export with its sine made a tangent's cousin: the operator code of SIN replaced by EXP."""
    import tflite

    data = bytearray(FILE.read_bytes())
    model = tflite.Model.GetRootAsModel(data, 0)
    for index in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(index)
        if code.BuiltinCode() == tflite.BuiltinOperator.SIN:
            for slot in (4, 10):
                field = code._tab.Offset(slot)
                data[code._tab.Pos + field] = tflite.BuiltinOperator.EXP if field else data[code._tab.Pos + field]
    path = tmp_path / "exp.tflite"
    path.write_bytes(bytes(data))
    status, _, err = run(capsys, "extract", path, "--output", tmp_path / "model")
    lines = err.splitlines()
    assert status == 1 and lines[-1].startswith("error: ") and "seconds formula" in lines[-1]
    assert any("EXP(t" in line for line in lines[:-1]) and any("MINIMUM(" in line for line in lines[:-1])
    assert not (tmp_path / "model").exists()


def test_nothing_is_left_where_nothing_may_be_written(capsys, tmp_path):
    status, _, err = run(capsys, "extract", FILE, "--output", tmp_path / "absent" / "model")
    assert status == 1 and "is not a directory" in err
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
