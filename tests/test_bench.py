"""The benchmarks run and their figures can be read; what they measure is no test."""

import copy
import json
import sys
from importlib.util import find_spec

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG

from golden.__main__ import main as golden
from golden.bench import write_random
from golden.bench_side import open_side
from golden.recording import GoldenError
from mlx_audio_native.bench import STAGES, TOKENIZER, Bench, RandomModel, count_primitives
from mlx_audio_native.cli import main
from mlx_audio_native.errors import InputError
from mlx_audio_native.releases import OPEN_1_0, SMALL, release_config
from mlx_audio_native.request import window_frames
from mlx_audio_native.tokenizer import Tokenizer


def random_model(dtype=None):
    config = copy.deepcopy(CONFIG)
    prompt = config["model"]["conditioning"]["configs"][0]["config"]
    prompt["t5_config"]["vocab_size"] = len(Tokenizer(TOKENIZER))
    return RandomModel("random", config, dtype)


def test_every_stage_is_told_and_written(small_folder, tmp_path, capsys):
    path = tmp_path / "bench.json"
    options = ["--seconds", "2", "--steps", "2", "--batch", "2", "--runs", "1", "--json", str(path)]
    assert main(["bench", "--model", str(small_folder), *options]) == 0
    told, report = capsys.readouterr().out, json.loads(path.read_text())
    assert list(report["stages"]) == list(STAGES)
    for name, row in report["stages"].items():
        assert row["first"] > 0 and 0 < row["minimum"] <= row["median"], name
        assert f"| {name} | {row['first'] * 1e3:.2f} | {row['median'] * 1e3:.2f} |" in told
    assert (report["batch"], report["seconds"], report["steps"], report["runs"]) == (2, 2, 2, 1)
    assert report["realtime"] == pytest.approx(4 / report["stages"]["clip"]["median"])
    on_gpu = mx.default_device() == mx.gpu
    assert set(report["primitives"]) == ({"a step", "decoding"} if on_gpu else set())
    assert f"MLX: {mx.__version__}" in told and "TF32: " in told and "2 steps of pingpong" in told


def test_random_weights_are_the_same_each_time_and_fit_half_precision():
    clips = [random_model(dtype).generate("kick", seconds=2, seed=0).samples for dtype in ("float16", None, None)]
    assert np.array_equal(clips[1], clips[2])
    scale = np.abs(clips[1]).max()
    assert 1e-3 < scale < 10
    assert np.abs(clips[0] - clips[1]).max() < 0.05 * scale


@pytest.mark.parametrize(("name", "window"), [(SMALL, 11.888), (OPEN_1_0, 47.554)])
def test_a_release_has_its_window(name, window):
    from mlx_audio_native.config import ModelConfig

    config = ModelConfig.from_dict(release_config(name))
    assert window_frames(config) / config.sample_rate == pytest.approx(window, abs=1e-3)


def test_primitives_of_what_is_not_evaluated_are_counted():
    x = mx.ones((2, 3))
    mx.eval(x)
    assert count_primitives(mx.sin(x).T + x.T) == 4


def test_a_run_that_warms_up_is_not_counted(small_model):
    bench = Bench(small_model, seconds=1, steps=1)
    for run in (bench.run, bench.warm_up, bench.run):
        run()
    assert {len(bench.times.seconds[stage]) for stage in STAGES} == {2}


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"batch": 0}, "batch must be at least 1"), ({"seconds": 60}, "within the model's window")],
)
def test_what_cannot_be_measured_is_said(small_model, options, problem):
    with pytest.raises(InputError, match=problem):
        Bench(small_model, **options)


def test_a_side_that_cannot_run_is_one_line(small_folder, capsys):
    assert golden(["bench", "--model", str(small_folder), "--torch-python", "no-such-python"]) == 1
    assert capsys.readouterr().err == "error: cannot start no-such-python: No such file or directory\n"
    with (
        pytest.raises(GoldenError, match="^torch did not run: .*no_such_module"),
        open_side("torch", "no_such_module", sys.executable),
    ):
        pass


@pytest.mark.skipif(find_spec("stable_audio_tools") is None, reason="the reference is not installed")
def test_the_reference_is_timed_beside_the_runtime(tmp_path, capsys):
    config = copy.deepcopy(CONFIG)
    config["model"]["conditioning"]["configs"][0]["config"]["t5_config"]["vocab_size"] = len(Tokenizer(TOKENIZER))
    write_random(tmp_path / "random", config)
    path = tmp_path / "bench.json"
    options = ["--seconds", "2", "--steps", "2", "--batch", "2", "--runs", "4", "--json", str(path)]
    assert golden(["bench", "--model", str(tmp_path / "random"), *options]) == 0
    report = json.loads(path.read_text())
    assert (report["runs"], set(report["sides"]["torch"]["stages"])) == (4, set(STAGES))
    assert "ratio of medians" in capsys.readouterr().out
