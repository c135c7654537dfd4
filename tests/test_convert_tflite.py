"""`convert` of TFLite files: a folder with a whole model's, and T5 from an export of conditioners."""

import json
import shutil
from pathlib import Path

import pytest

from golden.__main__ import main as golden
from mlx_audio_native.cli import main
from mlx_audio_native.config import read_config_json
from mlx_audio_native.model import DEMO
from mlx_audio_native.tensorfile import open_tensors, sha256, write_tensors
from mlx_audio_native.weights import read_tensors

DATA = Path(__file__).parent.parent / "golden" / "data"
EXPORT = DATA / "demo_conditioners_float32.tflite"
T5 = "conditioner.conditioners.prompt.model."


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_a_folder_with_a_models_files(name, tmp_path, capsys):
    folder = tmp_path / "arm"
    folder.mkdir()
    files = [f"autoencoder_{name}.tflite", "conditioners.tflite", f"dit_{name}.tflite"]
    for file in files:
        shutil.copyfile(DATA / "arm" / file, folder / file)
    # a small export's vocabulary is its own; whose tokenizer comes along changes no tensor
    shutil.copyfile(DATA / "parity" / "equal_heads" / "spiece.model", folder / "spiece.model")
    output = tmp_path / "model"
    assert main(["convert", str(folder), "--output", str(output)]) == 0
    assert "tensors recovered" in capsys.readouterr().out
    sources = json.loads((output / "config.json").read_text())["provenance"]["sources"]
    assert [(source["file"], source["sha256"]) for source in sources] == [(f, sha256(folder / f)) for f in files]
    assert golden(["compare", str(output), str(DATA / "arm" / f"{name}.safetensors")]) == 0


def test_t5_from_an_export_of_conditioners(tmp_path, capsys):
    """The embedded model without its T5, which comes back byte for byte."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    stored = open_tensors(DEMO / "model.safetensors")
    write_tensors(checkpoint / "model.safetensors", {k: t for k, t in stored.items() if not k.startswith(T5)})
    (checkpoint / "model_config.json").write_text(json.dumps(read_config_json(DEMO)))
    options = ["--output", str(tmp_path / "model"), "--conditioners", str(EXPORT)]
    assert main(["convert", str(checkpoint), *options]) == 1
    assert "there is no tokenizer" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), *options, "--tokenizer", str(DEMO / "spiece.model")]) == 0
    found, expected = read_tensors(tmp_path / "model"), read_tensors(DEMO)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all().item() for name in found)
    sources = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]["sources"]
    assert sources[-1]["sha256"] == sha256(EXPORT)


@pytest.mark.parametrize("broken", ["two", "damaged", "missing"])
def test_files_that_are_no_model_leave_nothing(broken, tmp_path, capsys):
    folder = tmp_path / "arm"
    folder.mkdir()
    shutil.copyfile(EXPORT, folder / "a.tflite")
    if broken == "two":
        shutil.copyfile(EXPORT, folder / "b.tflite")
    elif broken == "damaged":
        (folder / "a.tflite").write_bytes(EXPORT.read_bytes()[:1000])
    assert main(["convert", str(folder), "--output", str(tmp_path / "model")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arm"]
