"""Folders with the three files of Arm's recipe: what is recovered, against the source, the goldens and the runtime."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from extraction import ExtractionError, arm, arm_check, oobleck
from extraction.graph import Wiring
from extraction.schema import read as read_graph
from golden.__main__ import main
from mlx_audio_native import load
from mlx_audio_native.errors import InputError
from mlx_audio_native.weights import save

ARM = Path(__file__).parent.parent / "golden" / "data" / "arm"
# the DiT of the second was exported by position
NAMES = ("float32", "int8")
LAYERS = "model.model.transformer.layers."
DECODER = "pretransform.model.decoder.layers."
Tensors = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Puts the files of an export together, under names that tell nothing."""

    def make(name: str) -> Path:
        path = tmp_path / f"arm_{name}"
        path.mkdir()
        for place, file in enumerate(("autoencoder_" + name, "dit_" + name, "conditioners")):
            shutil.copyfile(ARM / f"{file}.tflite", path / f"{place}.tflite")
        return path

    return make


def source() -> Tensors:
    """The exported model's tensors in float32, weight norm fused."""
    tensors = {name: array.astype(np.float32) for name, array in load_file(ARM / "source.safetensors").items()}
    for name in [name for name in tensors if name.endswith("weight_g")]:
        gain, direction = tensors.pop(name), tensors.pop(name[:-1] + "v")
        tensors[name[:-2]] = direction * (gain / np.sqrt((direction**2).sum((1, 2), keepdims=True)))
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_what_is_recovered_saves_loads_and_equals_the_files_outputs(name, folder, tmp_path, capsys):
    config, tensors, report = arm.read(folder(name))
    save(tmp_path / "model", config, tensors)
    assert main(["compare", str(tmp_path / "model"), str(ARM / f"{name}.safetensors")]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{stage}" in out for stage in ("seconds.", "conditioning.", "velocity.t=1", "decoder."))
    checks = {kind: off for file in report.files for kind, off in file.check.items()}
    assert set(checks) == {"seconds", "text", "velocity", "decoder"}
    assert max(checks.values()) <= 1e-5


def test_float32_weights_are_the_sources(folder):
    _, tensors, _ = arm.read(folder("float32"))
    expected = source()
    kept = {name for name in expected if ".encoder.layers" not in name or name.startswith("conditioner")}
    assert set(tensors) == kept
    for name, array in tensors.items():
        wanted, folded = expected[name], False
        if name.startswith(LAYERS) and "ff" in name:
            # the converter folds this norm into the product behind it
            layer = name[: len(LAYERS) + 1]
            gain, offset = expected[f"{layer}.ff_norm.gamma"], expected[f"{layer}.ff_norm.beta"]
            folded = "ff_norm" in name or "ff.0" in name
            wanted = {
                f"{layer}.ff_norm.gamma": np.ones_like(gain),
                f"{layer}.ff_norm.beta": np.zeros_like(offset),
                f"{layer}.ff.ff.0.proj.weight": expected[f"{layer}.ff.ff.0.proj.weight"] * gain,
                f"{layer}.ff.ff.0.proj.bias": expected[f"{layer}.ff.ff.0.proj.weight"] @ offset
                + expected[f"{layer}.ff.ff.0.proj.bias"],
            }.get(name, wanted)
        logarithm = name.endswith((".alpha", ".beta")) and name.startswith(DECODER)
        fused = name.startswith(DECODER) and name.endswith(".weight")
        bound = 2e-6 if folded or logarithm else 2e-7 if fused else 0
        assert array.shape == wanted.shape
        assert np.abs(array - wanted).max() <= bound, name


def test_int8_weights_are_within_half_a_step_of_the_sources(folder):
    _, tensors, _ = arm.read(folder("int8"))
    expected = source()
    for name in (f"{LAYERS}1.self_attn.to_qkv.weight", f"{LAYERS}0.cross_attn.to_kv.weight", f"{DECODER}0.weight"):
        rows = expected[name].reshape(len(expected[name]), -1)
        step = np.abs(rows).max(1) / 127
        off = np.abs(tensors[name].reshape(rows.shape) - rows).max(1)
        assert (off <= 0.51 * step).all() and off.max() > 0


def test_a_lost_global_conditioning_is_reported_and_left_out(folder, tmp_path):
    whole, _, said = arm.read(folder("float32"))
    lost, tensors, report = arm.read(folder("int8"))
    dims = [config["model"]["diffusion"]["config"]["global_cond_dim"] for config in (whole, lost)]
    assert dims == [32, 0]
    assert not any("to_global_embed" in name for name in tensors)
    assert any("has lost its global conditioning" in text for text in report.warnings)
    assert any("feeds no operator" in text for text in report.warnings)
    assert said.warnings == []
    save(tmp_path / "model", lost, tensors)
    model = load(tmp_path / "model")
    tokens = mx.ones((1, 17, 32))
    latents, t = mx.random.normal((1, 24, 8), key=mx.random.key(0)), mx.array([0.5])
    quiet, loud = (model.dit(latents, t, tokens, mx.full((1, 32), value)) for value in (0.0, 5.0))
    assert mx.array_equal(quiet, loud)
    with pytest.raises(InputError, match="has no encoder"):
        model.autoencoder.encode(mx.zeros((1, 64, 2)))


def test_every_constant_is_named_or_used(folder):
    _, _, report = arm.read(folder("float32"))
    net = report.files[1]
    beside = next(note for note in net.notes if note.startswith("constants beside the weights"))
    # the rotary tables, π twice, the norms' epsilons, the factor of the scores
    for named in ("2 × a table [25, 32]", "6.283185", "1e-05", "1e-06", "shapes and axes"):
        assert named in beside
    assert not any("reaches no output" in note for file in report.files for note in file.notes)


def test_files_that_are_missing_or_too_many_are_named(folder, tmp_path):
    path = folder("float32")
    (path / "1.tflite").rename(tmp_path / "1.tflite")
    with pytest.raises(ExtractionError, match="has no .tflite file with a model's DiT$"):
        arm.read(path)
    shutil.copyfile(path / "0.tflite", path / "9.tflite")
    with pytest.raises(ExtractionError, match="0.tflite and 9.tflite in .* are both a model's autoencoder"):
        arm.read(path)
    with pytest.raises(ExtractionError, match="holds 0 .tflite files"):
        arm.read(tmp_path / "nowhere")


def damaged(path: Path, shape: tuple[int, ...], value: float, place: int = 0) -> None:
    """Puts another value into the first element of one of the float constants of a shape."""
    graph, data = read_graph(path), bytearray(path.read_bytes())
    found = [tensor for tensor in graph.tensors if tensor.data is not None and tensor.shape == shape]
    constant = bytes([t for t in found if t.type == "FLOAT32"][place].data)
    start = bytes(data).index(constant)
    data[start : start + 4] = np.float32(value).tobytes()
    path.write_bytes(bytes(data))


def test_a_graph_that_computes_something_else_is_refused(folder):
    path = folder("float32")
    damaged(path / "1.tflite", (25, 32), 3.0)  # a rotary table, which the recovery does not read
    with pytest.raises(ExtractionError, match=r"1.tflite: what was recovered disagrees with the graph: the velocity"):
        arm.read(path)


def test_a_snake_that_cannot_be_is_refused(folder):
    path = folder("float32")
    damaged(path / "0.tflite", (1, 8, 1), -1.0)
    with pytest.raises(ExtractionError, match=r"0.tflite: the snake that ends in .* factors that are not above 0"):
        arm.read(path)


def test_weights_that_are_not_finite_are_refused(folder):
    path = folder("float32")
    damaged(path / "1.tflite", (68, 8), float("nan"))
    with pytest.raises(ExtractionError, match=r"1.tflite: .*not.* finite"):
        arm.read(path)


@pytest.mark.parametrize("place", range(4))
def test_a_decoder_that_is_too_much_work_is_compared_as_far_as_it_is_not(place, folder, monkeypatch):
    stages = oobleck.recover(Wiring(read_graph(ARM / "autoencoder_float32.tflite"))).stages
    assert len(stages) == 4
    monkeypatch.setattr(arm_check, "_MOST_WORK", stages[place][1])
    _, _, report = arm.read(folder("float32"))
    decoder = report.files[2]
    assert decoder.check["decoder"] <= 1e-5
    said = [note for note in decoder.notes if note.startswith("the decoder is compared up to its layer")]
    assert said == ([f"the decoder is compared up to its layer {place + 1} of 3 only"] if place < 3 else [])
