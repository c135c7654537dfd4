"""Parity with the reference from stored tensors; golden files, and those recorded from TFLite exports."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from golden.__main__ import main
from golden.compare import compare
from golden.record import drift
from golden.recording import (
    BOUNDS,
    PARITY,
    TF32_BOUND,
    TF32_SAMPLING_BOUND,
    GoldenError,
    Recording,
    Request,
    Row,
    bound_of,
    hold,
)
from mlx_audio_native import load, sampling

FIXTURES = ("equal_heads", "fewer_heads", "v_objective")


def golden_of(name: str) -> Recording:
    return Recording.read(PARITY / f"{name}.safetensors")


def seen(folder: Path, golden: Recording) -> list[Row]:
    """The rows that are not OK."""
    return [row for row in compare(load(folder, dtype="float32"), golden) if not row.ok]


@pytest.mark.parametrize("name", FIXTURES)
def test_the_runtime_equals_the_reference(name):
    assert [str(row) for row in seen(PARITY / name, golden_of(name))] == []


def test_the_embedded_model_equals_the_reference(capsys):
    assert main(["compare"]) == 0
    out = capsys.readouterr().out
    assert "the file recorded from" in out and "not the file" not in out and out.endswith("\nOK\n")


def test_what_the_goldens_cover():
    """Both head layouts, values where the norm's epsilon counts, a long prompt, every sampler and kind of guidance."""
    for name in FIXTURES:
        golden, config = golden_of(name), load(PARITY / name).config
        assert {row.split(".")[0] for row in golden.tensors} == {*BOUNDS, "input"} - {"clip"}
        own = {key for key, sampler in sampling.SAMPLERS.items() if config.objective in sampler.objectives}
        assert {run.sampler for run in golden.request.runs} == own
        assert {(run.cfg_scale != 1, run.negative) for run in golden.request.runs} == {
            (False, False),
            (True, False),
            (True, True),
        }
        assert golden["tokens.mask"].sum(1).max() == min(90, config.prompt.encode_length)
        assert (config.dit.kv_heads < config.dit.num_heads) == (name != "equal_heads")
        recorded = golden.provenance
        assert "stable-audio-tools 0.0.19" in recorded["versions"] and "k-diffusion 0.1.1" in recorded["versions"]
        assert ("-6" if name != "v_objective" else "polyexponential") in recorded["schedule"]
    tensors = load_file(PARITY / "equal_heads" / "model.safetensors")
    qkv = tensors["model.model.transformer.layers.0.self_attn.to_qkv.weight"]
    width = qkv.shape[1]
    # of inputs normalised to unit variance
    assert 3e-7 < np.square(qkv[: 2 * width].astype(np.float32)).sum(1).mean() < 3e-6
    config = load(PARITY / "fewer_heads").config
    assert config.prompt.encode_length == 128 and config.prompt.max_length == 64 == config.conditioning.cond_dim


def test_goldens_are_small():
    assert sum(path.stat().st_size for path in PARITY.rglob("*") if path.is_file()) < 5e6


def test_golden_files_survive_writing_and_reading(tmp_path):
    golden = golden_of("equal_heads")
    golden.write(tmp_path / "again.safetensors")
    again = Recording.read(tmp_path / "again.safetensors")
    assert again.request == golden.request and again.provenance == golden.provenance
    assert again.tensors.keys() == golden.tensors.keys()
    assert all(np.array_equal(again[name], golden[name]) for name in golden.tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def test_drift_of_values_provenance_and_request_is_told():
    stored = golden_of("equal_heads")
    assert drift(stored, stored) == []
    name = "velocity.t=0.5"
    off = {**stored.tensors, name: stored[name] * np.float32(1.001)}
    other = {**stored.provenance, "sha256": "0", "versions": "torch 9"}
    fresh = replace(stored, tensors=off, provenance=other, request=replace(stored.request, negative_prompt="hiss"))
    first, second, row = drift(fresh, stored)
    assert first.startswith("sha256 was ") and "asked" in second and row.startswith(name) and "NOT OK" in row


def test_shapes_missing_tensors_and_nan_are_not_ok():
    one = np.ones((2, 3), np.float32)
    rows = list(
        hold(
            {"velocity.a": one[:1], "velocity.b": one * np.nan, "velocity.d": one},
            {"velocity.a": one, "velocity.b": one, "velocity.c": one},
            BOUNDS["velocity"],
            "no such part",
        )
    )
    assert [(row.name, row.ok, row.problem) for row in rows] == [
        ("velocity.a", False, "found (1, 3)"),
        ("velocity.b", False, ""),
        ("velocity.c", False, "no such part"),
        ("velocity.d", False, "no golden for it"),
    ]


def test_what_is_no_golden_file_ends_in_one_line(tmp_path, capsys):
    stored = PARITY / "equal_heads.safetensors"
    (tmp_path / "text").write_text("nothing")
    (tmp_path / "cut").write_bytes(stored.read_bytes()[:-100])
    save_file({"a": np.zeros(1)}, tmp_path / "plain")
    golden = golden_of("equal_heads")
    save_file(golden.tensors, tmp_path / "asked", {"format": "mlx-audio-native golden 2", "request": '{"prompts": 3}'})
    lacking = {name: array for name, array in golden.tensors.items() if name != "seconds.global_cond"}
    Recording(lacking, golden.request, golden.stages, golden.provenance).write(tmp_path / "lacking")
    few = {**golden.tensors, "input.noise": golden.tensors["input.noise"][:2]}
    replace(golden, tensors=few).write(tmp_path / "few")
    flat = {**golden.tensors, "input.latents": golden.tensors["input.latents"].ravel()}
    replace(golden, tensors=flat).write(tmp_path / "flat")
    for path, said in (
        ("missing", "cannot read"),
        ("text", "is no golden file"),
        ("cut", "is no golden file"),
        ("plain", "its header does not say"),
        ("asked", "request"),
        ("flat", "input 'latents' is (128,), expected 3 axes"),
        ("lacking", "no tensor of the stage seconds"),
    ):
        assert main(["compare", str(PARITY / "equal_heads"), str(tmp_path / path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert main(["compare", str(PARITY / "equal_heads"), str(tmp_path / "few")]) == 1
    assert "NOT OK: the golden file has less noise" in capsys.readouterr().out
    assert main(["compare", str(PARITY / "equal_heads")]) == 1
    assert "neither" in capsys.readouterr().err


def test_a_golden_file_of_another_model_is_refused():
    with pytest.raises(GoldenError, match="of another model: numbers "):
        list(compare(load(PARITY / "equal_heads"), golden_of("fewer_heads")))


def test_tf32_widens_the_bounds_of_what_multiplies_matrices_and_that_is_said(monkeypatch, capsys):
    assert bound_of("velocity", tf32=True) == TF32_BOUND > BOUNDS["velocity"]
    assert bound_of("clip", tf32=True) == TF32_SAMPLING_BOUND > TF32_BOUND
    assert all(bound_of(stage, tf32=True) == BOUNDS[stage] for stage in ("tokens", "seconds"))
    assert bound_of("velocity", "int8", tf32=True) == bound_of("velocity", "int8") > TF32_BOUND
    monkeypatch.setattr("golden.compare.multiplies_in_tf32", lambda: True)
    assert main(["compare", "--stages", "seconds", "velocity"]) == 0
    out = capsys.readouterr().out
    assert "TF32 on" in out and "rel rms 0.01" in out and "max abs 1e-06" in out


def test_only_the_stages_asked_for_are_compared(capsys):
    assert main(["compare", "--stages", "decoder"]) == 0
    names = [line.split(".")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" OK")]
    assert names == ["decoder"]
    files = [str(PARITY / name) for name in ("equal_heads", "tflite_whole.safetensors")]
    assert main(["compare", *files, "--stages", "text"]) == 1
    assert "the stage text was not recorded, only seconds, " in capsys.readouterr().err


def test_conformance_shows_each_stage_in_each_precision(capsys):
    files = [str(PARITY / name) for name in ("equal_heads", "equal_heads.safetensors")]
    assert main(["conformance", *files, "--stages", "text", "velocity", "--precision", "float32", "bfloat16"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("text", "velocity"))]
    off = {(stage, precision): float(relative_rms) for stage, precision, _, relative_rms, _ in table}
    assert len(off) == 4 and all(
        off[stage, "float32"] < 5e-6 < off[stage, "bfloat16"] for stage in ("text", "velocity")
    )


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "golden.record_torch", raising=False)
    assert main(["record", str(PARITY / "equal_heads"), "never written"]) == 1
    assert capsys.readouterr().err.startswith("error: record needs torch; ")


def test_comparing_needs_no_torch():
    code = "import golden.compare, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_request_of_unknown_keys_is_refused():
    values = {**json.loads(json.dumps(golden_of("equal_heads").request.__dict__, default=lambda run: run.__dict__))}
    assert Request.read(values) == golden_of("equal_heads").request
    with pytest.raises(Exception, match="unknown key 'promts'"):
        Request.read({**values, "promts": []})


@pytest.mark.parametrize("name", ["tflite_whole", "tflite_lost", "tflite_int8"])
def test_the_runtime_equals_exports_of_its_model(name, capsys):
    """Recorded from TFLite files by the interpreter; their DiT in int8 is held to a wider bound, and that is said."""
    path = PARITY / f"{name}.safetensors"
    assert main(["compare", str(PARITY / "equal_heads"), str(path)]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{stage}" in out for stage in ("seconds.", "conditioning.", "velocity.t=1", "decoder."))
    assert ("velocity: recorded from int8 weights" in out) == (name == "tflite_int8")
    golden = Recording.read(path)
    lost = name == "tflite_lost"
    assert ("golden global conditioning: lost" in out) == lost == (not golden.input("global_cond").any())


def test_a_conditioner_alone_is_compared_with_what_was_recorded_of_it(tmp_path, capsys):
    whole = Recording.read(PARITY / "tflite_whole.safetensors")
    stages = {"seconds": "float32", "conditioning": "float32"}
    replace(whole, stages=stages).write(tmp_path / "golden.safetensors")
    folder = tmp_path / "conditioner"
    shutil.copytree(PARITY / "equal_heads", folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in tensors.items() if name.startswith("conditioner.")}
    save_file(kept, folder / "model.safetensors")
    assert main(["compare", str(folder), str(tmp_path / "golden.safetensors")]) == 0
    assert "velocity" not in capsys.readouterr().out


def test_an_export_that_lost_its_global_conditioning_is_another_model():
    whole, lost = (Recording.read(PARITY / f"tflite_{name}.safetensors") for name in ("whole", "lost"))
    mixed = replace(lost, tensors={**lost.tensors, "input.global_cond": whole.input("global_cond")})
    failed = [row for row in compare(load(PARITY / "equal_heads", dtype="float32"), mixed) if not row.ok]
    assert {row.stage for row in failed} == {"velocity"}
