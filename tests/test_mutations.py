"""Known ways of getting the model wrong, one at a time: the stored goldens see each, in the stage it belongs to."""

import json
import math
import shutil
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
from golden.recording import DEMO, PARITY, Recording, Row
from mlx_audio_native import conditioning, dit, load, model, names, sampling
from mlx_audio_native.oobleck import Snake

DIT = "model.model."
LAYERS = DIT + "transformer.layers."


def seen(name: str, folder: Path) -> list[Row]:
    """The rows of a fixture's goldens that are not OK."""
    golden = Recording.read(PARITY / f"{name}.safetensors")
    return [row for row in compare(load(folder, dtype="float32"), golden) if not row.ok]


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
    encode = conditioning.Conditioner.encode

    def mutated(self, ids, mask, **numbers):
        encoded, length = encode(self, ids, mask, **numbers), self.config.prompt.max_length
        assert self.config.cross_attention_ids[0] == self.config.prompt.id
        ids, mask = mx.array(ids), mx.array(mask)
        text = self.project_out(self.t5(ids, mask)[:, :length]) * mask[:, None, :length]
        return encoded._replace(cross_attention=mx.concatenate([text, encoded.cross_attention[:, length:]], axis=1))

    edits.patch.setattr(conditioning.Conditioner, "encode", mutated)


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


def other_noise_levels(edits: Edits) -> None:
    edits.patch.setattr(sampling, "SIGMA_MIN", 0.03)


def noise_of_strength_one_at_every_level(edits: Edits) -> None:
    def sample_noise(velocity, noise, sampler, steps):
        return sampling.sample(velocity, next(noise), noise, sampler, steps)

    edits.patch.setattr(sampling, "sample_noise", sample_noise)


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
    other_noise_levels: ("v_objective", "sampling"),
    noise_of_strength_one_at_every_level: ("v_objective", "sampling"),
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
        rows = seen(name, folder)
    # the steps of one sampling count as one
    rows_seen = dict.fromkeys(".".join(row.name.split(".")[:2]) for row in rows)
    print(f"\n{mutate.__name__}, in {name}: seen by {', '.join(rows_seen) or 'nothing'}")
    assert rows and rows[0].stage == first


def test_a_copy_without_a_mistake_is_ok(tmp_path):
    with mutated(lambda edits: None, "equal_heads", tmp_path / "copy") as folder:
        assert seen("equal_heads", folder) == []


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


def test_one_tensor_of_the_embedded_model_a_thousandth_off_is_seen(tmp_path, capsys):
    tensors = load_file(DEMO / "model.safetensors")
    name = DIT + "transformer.project_out.weight"
    tensors[name] = tensors[name].astype(np.float32) * np.float32(1.001)
    shutil.copytree(DEMO, tmp_path / "scaled")
    save_file(tensors, tmp_path / "scaled" / "model.safetensors")
    assert main(["compare", str(tmp_path / "scaled"), str(PARITY / "demo.safetensors")]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT OK: velocity (5), sampling (")
