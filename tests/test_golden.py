"""Parity with the reference from stored tensors, and proof that every known way of getting it wrong is seen by them."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from golden.__main__ import main
from golden.compare import compare
from golden.recording import BOUNDS, PARITY, GoldenError, Recording, Request, Row, hold
from mlx_audio_native import conditioning, dit, load, model, names, sampling
from mlx_audio_native.oobleck import Snake

FIXTURES = ("equal_heads", "fewer_heads")
DIT = "model.model."
LAYERS = DIT + "transformer.layers."


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
        assert {run.sampler for run in golden.request.runs} == set(sampling.SAMPLERS)
        assert {(run.cfg_scale != 1, run.negative) for run in golden.request.runs} == {
            (False, False),
            (True, False),
            (True, True),
        }
        assert golden["tokens.mask"].sum(1).max() == min(90, config.prompt.encode_length)
        assert (config.dit.kv_heads < config.dit.num_heads) == (name == "fewer_heads")
        recorded = golden.provenance
        assert "stable-audio-tools 0.0.19" in recorded["versions"] and "-6" in recorded["schedule"]
    qkv = load_file(PARITY / "equal_heads" / "model.safetensors")[LAYERS + "0.self_attn.to_qkv.weight"]
    width = qkv.shape[1]
    # of inputs normalised to unit variance
    assert 3e-7 < np.square(qkv[: 2 * width].astype(np.float32)).sum(1).mean() < 3e-6
    assert config.prompt.encode_length == 128 and config.prompt.max_length == 64 == config.conditioning.cond_dim


def test_goldens_are_small():
    assert sum(path.stat().st_size for path in PARITY.rglob("*") if path.is_file()) < 4e6


@dataclass
class Edits:
    """What a mutation may change: the stored config and tensors, and through `patch` the runtime's code."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    patch: pytest.MonkeyPatch

    def number(self, **values: Any) -> None:
        for entry in self.config["model"]["conditioning"]["configs"]:
            if entry["type"] == "number":
                entry["config"].update(values)

    def each(self, ending: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        found = [name for name in self.tensors if name.endswith(ending)]
        assert found, ending
        for name in found:
            self.tensors[name] = np.ascontiguousarray(change(self.tensors[name]))


def feature_order(edits: Edits) -> None:
    edits.number(features=["cos", "sin", "x"])


def missing_normalisation(edits: Edits) -> None:
    edits.number(scale=1.0)


def pi_in_half_precision(edits: Edits) -> None:
    edits.number(angle_constants=[2.0, 3.140625])


def mask_over_channels(edits: Edits) -> None:
    def encode(self, ids, mask):
        ids, mask, length = mx.array(ids), mx.array(mask), self.config.prompt.max_length
        states = self.project_out(self.t5(ids, mask)[:, :length])
        return states * mask[:, None, :length], mask[:, :length].astype(mx.float32)

    edits.patch.setattr(conditioning.Conditioner, "_encode_text", encode)


def encode_length_64_for_128(edits: Edits) -> None:
    prompt = edits.config["model"]["conditioning"]["configs"][0]["config"]
    assert prompt.pop("encode_length") == 128


def timestep_feature_order(edits: Edits) -> None:
    edits.each("to_timestep_embed.0.weight", lambda weight: np.roll(weight, 128, axis=1))


def gate_and_value_swapped(edits: Edits) -> None:
    for name in ("weight", "bias"):
        edits.each(f"ff.ff.0.proj.{name}", lambda array: np.roll(array, len(array) // 2, axis=0))


def rope_pairing(edits: Edits) -> None:
    def rotate(self, x):
        return mx.fast.rope(x, self.rotary_dim, traditional=True, base=None, scale=1.0, offset=0, freqs=self._periods)

    edits.patch.setattr(dit.SelfAttention, "rotate", rotate)


def qk_norm_epsilon(edits: Edits) -> None:
    edits.patch.setattr(dit, "_QK_NORM_EPS", 1e-5)


def transposed_weights_not_transposed(edits: Edits) -> None:
    """Only where a layer keeps its width can the mistake go unnoticed by shapes."""
    square = [
        name
        for name, array in edits.tensors.items()
        if name.endswith("layers.1.weight_v") and ".decoder.layers." in name and array.shape[0] == array.shape[1] != 1
    ]
    assert square
    for name in square:
        edits.each(name, lambda array: array.transpose(1, 0, 2))


def alpha_not_exponentiated(edits: Edits) -> None:
    layout = names._stored_layout

    def raw(owner, target, shape):
        stored, convert = layout(owner, target, shape)
        return stored, None if isinstance(owner, Snake) and target.endswith("frequency") else convert

    edits.patch.setattr(names, "_stored_layout", raw)


def schedule_start(edits: Edits) -> None:
    def schedule(steps, sigma_max=1.0):
        line = (-6.2 + (2 + 6.2) * i / steps for i in range(1, steps))
        return [sigma_max, *(1 / (1 + math.exp(log_snr)) for log_snr in line), 0.0]

    for name, sampler in sampling.SAMPLERS.items():
        if sampler.schedule is sampling.log_snr_schedule:
            edits.patch.setitem(sampling.SAMPLERS, name, sampler._replace(schedule=schedule))


def noise_reused_between_steps(edits: Edits) -> None:
    def pingpong(velocity, x, schedule, noise):
        return sampling.pingpong(velocity, x, schedule, repeat(next(noise)))

    edits.patch.setitem(sampling.SAMPLERS, "pingpong", sampling.SAMPLERS["pingpong"]._replace(run=pingpong))


def seconds_token_kept_under_guidance(edits: Edits) -> None:
    velocity = model.Model.velocity

    def zeros_but_seconds(tokens):
        return mx.concatenate([mx.zeros_like(tokens[:, :64]), tokens[:, 64:]], axis=1)

    def mutated(self, request):
        class Altered:
            def __getattr__(self, name):
                return getattr(mx, name) if name != "zeros_like" else zeros_but_seconds

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "mx", Altered())
            return velocity(self, request)

    edits.patch.setattr(model.Model, "velocity", mutated)


# mutation → the fixture whose goldens see it, and the first stage that does
MUTATIONS = {
    feature_order: ("equal_heads", "seconds"),
    missing_normalisation: ("equal_heads", "seconds"),
    pi_in_half_precision: ("equal_heads", "seconds"),
    mask_over_channels: ("fewer_heads", "conditioning"),
    encode_length_64_for_128: ("fewer_heads", "tokens"),
    timestep_feature_order: ("equal_heads", "velocity"),
    gate_and_value_swapped: ("fewer_heads", "velocity"),
    rope_pairing: ("equal_heads", "velocity"),
    qk_norm_epsilon: ("equal_heads", "velocity"),
    transposed_weights_not_transposed: ("equal_heads", "decoder"),
    alpha_not_exponentiated: ("equal_heads", "decoder"),
    schedule_start: ("equal_heads", "sampling"),
    noise_reused_between_steps: ("fewer_heads", "sampling"),
    seconds_token_kept_under_guidance: ("fewer_heads", "sampling"),
}


@contextmanager
def mutated(mutate: Callable[[Edits], None], name: str, folder: Path) -> Iterator[Path]:
    """A copy of a fixture with the mutation applied, and the runtime's code too while inside."""
    shutil.copytree(PARITY / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        edits = Edits(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"), patch)
        mutate(edits)
        (folder / "config.json").write_text(json.dumps(edits.config))
        save_file(edits.tensors, folder / "model.safetensors")
        yield folder


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_known_mistake_is_seen(mutate, tmp_path):
    name, first = MUTATIONS[mutate]
    with mutated(mutate, name, tmp_path / name) as folder:
        rows = seen(folder, golden_of(name))
    # the steps of one sampling count as one
    rows_seen = dict.fromkeys(".".join(row.name.split(".")[:2]) for row in rows)
    print(f"\n{mutate.__name__}, in {name}: seen by {', '.join(rows_seen) or 'nothing'}")
    assert rows and rows[0].stage == first


def test_a_copy_without_a_mistake_is_ok(tmp_path):
    with mutated(lambda edits: None, "equal_heads", tmp_path / "copy") as folder:
        assert seen(folder, golden_of("equal_heads")) == []


@pytest.mark.parametrize(
    ("ending", "stage"),
    [
        ("prompt.model.shared.weight", "text"),
        ("seconds_total.embedder.embedding.0.weights", "seconds"),
        (DIT + "to_global_embed.2.weight", "velocity"),
        (LAYERS + "1.ff.ff.2.bias", "velocity"),
        ("decoder.layers.0.weight_g", "decoder"),
        ("encoder.layers.0.bias", "encoder"),
    ],
)
def test_one_tensor_a_thousandth_off_is_named_by_its_stage(tmp_path, capsys, ending, stage):
    def scaled(edits):
        # not in half precision, where a thousandth is one unit in the last place
        edits.each(ending, lambda array: array.astype(np.float32) * np.float32(1.001))

    with mutated(scaled, "equal_heads", tmp_path / "scaled") as folder:
        assert main(["compare", str(folder), str(PARITY / "equal_heads.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "not the file recorded from" in out
    assert out.splitlines()[-1].startswith(f"NOT OK: {stage} ("), out


def test_golden_files_survive_writing_and_reading(tmp_path):
    golden = golden_of("equal_heads")
    golden.write(tmp_path / "again.safetensors")
    again = Recording.read(tmp_path / "again.safetensors")
    assert again.request == golden.request and again.provenance == golden.provenance
    assert again.tensors.keys() == golden.tensors.keys()
    assert all(np.array_equal(again[name], golden[name]) for name in golden.tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def test_shapes_missing_tensors_and_nan_are_not_ok():
    one = np.ones((2, 3), np.float32)
    rows = list(
        hold(
            {"velocity.a": one[:1], "velocity.b": one * np.nan, "velocity.d": one},
            {"velocity.a": one, "velocity.b": one, "velocity.c": one},
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
    for path, said in (
        ("missing", "cannot read"),
        ("text", "is no golden file"),
        ("cut", "is no golden file"),
        ("plain", "its header does not say"),
        ("asked", "request"),
        ("lacking", "no tensor of the stage seconds"),
    ):
        assert main(["compare", str(PARITY / "equal_heads"), str(tmp_path / path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert main(["compare", str(PARITY / "equal_heads")]) == 1
    assert "neither" in capsys.readouterr().err


def test_a_golden_file_of_another_model_is_refused():
    with pytest.raises(GoldenError, match="of another model: numbers "):
        list(compare(load(PARITY / "equal_heads"), golden_of("fewer_heads")))


def test_comparing_needs_no_torch():
    code = "import golden.compare, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_request_of_unknown_keys_is_refused():
    values = {**json.loads(json.dumps(golden_of("equal_heads").request.__dict__, default=lambda run: run.__dict__))}
    assert Request.read(values) == golden_of("equal_heads").request
    with pytest.raises(Exception, match="unknown key 'promts'"):
        Request.read({**values, "promts": []})
