"""The command line, run in this process where nothing speaks against it."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from mlx_audio_native import Model, read_recipe
from mlx_audio_native.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def generate(small_folder, folder):
    def run(*arguments):
        return main(["generate", *arguments, "--model", str(small_folder)])

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def one_line(text, start):
    assert text.startswith(start) and text.count("\n") == 1, text
    return text


def test_a_prompt_in_a_wav_out(generate, folder, capsys):
    assert generate("Kick drum loop, 120 BPM", "--seconds", "1.5") == 0
    assert names(folder) == ["kick-drum-loop-120-bpm.wav"]
    samples, rate = soundfile.read(folder / "kick-drum-loop-120-bpm.wav")
    assert samples.shape == (1500, 2) and rate == 1000
    assert 0 < np.abs(samples).max() <= 1
    output = capsys.readouterr()
    assert re.fullmatch(r"kick-drum-loop-120-bpm\.wav: 1\.5 s, seed \d+\n", output.out)
    assert output.err == ""


def test_every_option_reaches_the_recipe(generate, folder, capsys):
    options = shlex.split("--seconds 1 --steps 3 --seed 9 --cfg-scale 2 --sampler euler --output a.wav")
    assert generate("kick", *options, "--negative-prompt", "sine tone") == 0
    recipe = read_recipe(folder / "a.wav")
    assert (recipe.prompt, recipe.seconds, recipe.steps, recipe.seed) == ("kick", 1, 3, 9)
    assert (recipe.cfg_scale, recipe.sampler, recipe.negative_prompt) == (2, "euler", "sine tone")
    one_line(capsys.readouterr().err, "warning: cfg_scale 2")


def test_the_same_seed_writes_the_same_file(generate, folder):
    for name in ("a.wav", "b.wav"):
        assert generate("kick", "--seed", "5", "--seconds", "1", "--output", name) == 0
    assert (folder / "a.wav").read_bytes() == (folder / "b.wav").read_bytes()


def test_count_numbers_files_and_seeds(generate, folder):
    assert generate("kick", "--count", "3", "--seed", "5", "--seconds", "1", "--steps", "1") == 0
    assert names(folder) == ["kick-2.wav", "kick-3.wav", "kick.wav"]
    assert [read_recipe(folder / name).seed for name in ("kick.wav", "kick-2.wav", "kick-3.wav")] == [5, 6, 7]


def test_a_warning_comes_once_however_many_clips(generate, folder, capsys):
    assert generate("kick", "--count", "3", "--seconds", "1", "--steps", "1", "--cfg-scale", "2") == 0
    one_line(capsys.readouterr().err, "warning: cfg_scale 2")


def test_a_default_name_gets_a_number_and_a_chosen_one_is_kept(generate, folder, capsys):
    quick = ("--seconds", "1", "--steps", "1")
    (folder / "kick.wav").write_text("mine")
    assert generate("kick", *quick) == 0
    assert names(folder) == ["kick-2.wav", "kick.wav"]
    capsys.readouterr()
    assert generate("kick", *quick, "--output", "kick.wav") == 1
    one_line(capsys.readouterr().err, "error: cannot write kick.wav: it exists, and is kept")
    assert (folder / "kick.wav").read_text() == "mine"
    assert generate("kick", *quick, "--output", "kick.wav", "--overwrite") == 0
    assert read_recipe(folder / "kick.wav").prompt == "kick"
    (folder / "sounds").mkdir()
    assert generate("kick", *quick, "--output", "sounds") == 0
    assert names(folder / "sounds") == ["kick.wav"]
    assert generate("…", *quick, "--output", "sounds") == 0
    assert names(folder / "sounds") == ["clip.wav", "kick.wav"]


def test_info_tells_the_recipe_and_from_makes_the_clip_again(generate, folder, capsys):
    assert generate("kick 'n' snare", "--seconds", "1.25", "--steps", "2", "--seed", "11", "--output", "a.wav") == 0
    capsys.readouterr()
    assert main(["info", "a.wav"]) == 0
    told = capsys.readouterr().out
    for value in ("kick 'n' snare", "1.25", "11", "pingpong"):
        assert value in told
    assert generate("--from", "a.wav", "--output", "b.wav") == 0
    assert (folder / "a.wav").read_bytes() == (folder / "b.wav").read_bytes()
    assert generate("--from", "a.wav", "--seed", "12", "--output", "c.wav") == 0
    assert read_recipe("c.wav").seed == 12 and read_recipe("c.wav").seconds == 1.25
    assert capsys.readouterr().err == ""


def test_another_length_overrides_that_of_the_recipe(generate, folder, capsys):
    assert generate("kick, 120 BPM", "--seconds", "1", "--steps", "1", "--output", "clip.wav") == 0
    assert generate("--from", "clip.wav", "--bars", "1", "--output", "loop.wav") == 0
    assert generate("--from", "loop.wav", "--seconds", "1", "--output", "again.wav") == 0
    assert (read_recipe("loop.wav").bars, read_recipe("loop.wav").seconds) == (1, 2)
    assert (folder / "again.wav").read_bytes() == (folder / "clip.wav").read_bytes()


@pytest.mark.parametrize("sampler", ["dpmpp-3m-sde", "dpmpp-2m", "v-ddim"])
def test_from_makes_a_clip_of_the_objective_v_again(make_folder, folder, capsys, sampler):
    model = str(make_folder(lambda config: config["model"]["diffusion"].update(diffusion_objective="v")))
    options = ["--seconds", "1", "--steps", "4", "--sampler", sampler, "--output", "a.wav"]
    assert main(["generate", "kick", *options, "--model", model]) == 0
    recipe = read_recipe(folder / "a.wav")
    assert (recipe.sampler, recipe.steps, recipe.cfg_scale) == (sampler, 4, 7)
    assert main(["generate", "--from", "a.wav", "--output", "b.wav", "--model", model]) == 0
    assert (folder / "a.wav").read_bytes() == (folder / "b.wav").read_bytes()
    assert capsys.readouterr().err == ""


def test_from_warns_when_the_weights_are_others(generate, folder, make_folder, capsys):
    assert generate("kick", "--seconds", "1", "--steps", "1", "--output", "a.wav") == 0
    other = make_folder(lambda config: config["model"]["diffusion"]["config"].update(depth=1))
    capsys.readouterr()
    assert main(["generate", "--from", "a.wav", "--output", "b.wav", "--model", str(other)]) == 0
    one_line(capsys.readouterr().err, "warning: a.wav was made by other weights ('small')")


def test_info_tells_what_a_folder_holds(small_folder, capsys):
    assert main(["info", str(small_folder)]) == 0
    told = capsys.readouterr().out
    for fact in ("conditioner: ", "dit: ", "autoencoder: ", "F32", "1000 Hz", "6.016 s", "rf_denoiser", "0 to 256"):
        assert fact in told


def test_info_of_a_stranger_cannot_steer_the_terminal(generate, folder, capsys):
    assert generate("kick \x1b[31m\x9b1m", "--seconds", "1", "--steps", "1", "--output", "a.wav") == 0
    capsys.readouterr()
    assert main(["info", "a.wav"]) == 0
    assert "\x1b" not in (told := capsys.readouterr().out) and "\x9b" not in told


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([""], "the prompt is empty"),
        (["kick", "--seconds", "0"], "seconds must be above 0"),
        (["kick", "--seconds", "nan"], "seconds must be a finite number"),
        (["kick", "--seconds", "-3"], "seconds must be above 0"),
        (["kick", "--seconds", "4000"], "seconds must be at most 3600"),
        (["kick", "--steps", "0"], "steps must be from 1"),
        (["kick", "--count", "0"], "--count must be at least 1"),
        (["kick", "--sampler", "ddim"], "unknown sampler 'ddim'"),
        (["kick", "--negative-prompt", "sine"], "a negative prompt does nothing"),
        (["kick", "--output", "missing/a.wav"], "cannot write missing/a.wav: there is no folder missing"),
        (["kick", "--output", "a.flac"], "cannot write a.flac: only .wav"),
        (["--from", "missing.wav"], "cannot read missing.wav"),
        (["--from", "text.wav"], "cannot use text.wav: it is not a WAV file"),
    ],
)
def test_bad_input_is_one_line_and_status_1_and_nothing_written(generate, folder, capsys, arguments, problem):
    (folder / "text.wav").write_text("hello")
    assert generate(*arguments) == 1
    assert one_line(capsys.readouterr().err, f"error: {problem}")
    assert names(folder) == ["text.wav"]


@pytest.mark.parametrize("arguments", [[], ["dance"], ["generate"], ["generate", "kick", "--steps", "few"], ["info"]])
def test_a_wrong_command_line_is_status_2(folder, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: mlx-audio-native" in capsys.readouterr().err


def test_a_damaged_model_is_one_line(make_folder, folder, capsys):
    model = make_folder()
    (model / "spiece.model").write_bytes(b"no model")
    assert main(["generate", "kick", "--model", str(model)]) == 1
    one_line(capsys.readouterr().err, "error: ")
    assert main(["info", str(folder)]) == 1
    one_line(capsys.readouterr().err, "error: ")
    assert names(folder) == []


def test_a_reader_that_stops_early_is_told_nothing(small_folder):
    command = [sys.executable, "-m", "mlx_audio_native", "info", str(small_folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 1


def test_debug_shows_the_traceback(generate, folder, capsys):
    assert generate("kick", "--steps", "0", "--debug") == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and "\nerror: steps must be" in told


def test_a_bug_is_a_line_too(generate, folder, capsys, monkeypatch):
    monkeypatch.setattr(Model, "generate", lambda *_, **__: 1 / 0)
    assert generate("kick") == 1
    one_line(capsys.readouterr().err, "error: unexpected ZeroDivisionError: division by zero")


def test_verbose_tells_times_and_memory(small_folder, tmp_path):
    command = [sys.executable, "-m", "mlx_audio_native", "generate", "kick", "--verbose", "--model", str(small_folder)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for stage in ("loading", "text and seconds", "sampling", "decoding"):
        assert re.search(rf"^{stage} +\d+\.\d+ s$", result.stderr, re.MULTILINE)
    assert "peak memory" in result.stderr


def test_ctrl_c_leaves_nothing_behind(small_folder, tmp_path):
    command = [sys.executable, "-m", "mlx_audio_native", "generate", "kick", "--steps", "10000", "--verbose"]
    process = subprocess.Popen(
        [*command, "--model", str(small_folder)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stderr:
        if line.startswith("text and seconds"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.stderr.read() == "interrupted\n"
    assert process.wait(30) == 130
    assert names(tmp_path) == []
