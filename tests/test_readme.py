"""The README's examples do what they say, with the embedded model."""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from mlx_audio_native.cli import main
from mlx_audio_native.model import DEMO

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In a folder that holds what a reader of the section on TFLite files has."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "golden" / "data" / "demo_conditioners_float32.tflite", "conditioners_float32.tflite")
    shutil.copyfile(DEMO / "spiece.model", "spiece.model")


def launch(line):
    """What a command line under MLX's launcher prints; the launcher's own status is 0 whatever happens."""
    scripts = sysconfig.get_path("scripts")
    # ring: a machine may have fewer GPUs than the line has processes. A stdin that ends makes the launcher spin.
    command = [f"{scripts}/mlx.launch", "--backend", "ring", *shlex.split(line)[1:]]
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        return process.stdout.read()


def test_examples(tmp_path):
    """All of them, in order; .ci/run runs what sets an environment up, test_page.py what serves and asks the page."""
    names = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "README.md", "exec"), names)
        elif language == "sh":
            for line in text.splitlines():
                if line.startswith("mlx-audio-native ") and line != "mlx-audio-native serve":
                    assert main(shlex.split(line)[1:]) == 0, line
                elif line.startswith("mlx.launch "):
                    assert "manifest.jsonl: " in launch(line), line
    assert all(len(names[name].samples) for name in ("audio", "loop", "lead"))
    assert names["tokens"].shape[:2] == (1, 65)
    assert (tmp_path / "house.wav").is_file()
    assert (tmp_path / "bass.wav").read_bytes() == (tmp_path / "again.wav").read_bytes()


def test_first_command_makes_the_clip_it_names(tmp_path):
    (line,) = [line for line in COMMANDS if "mlx-audio-native generate" in line and line.startswith("python3 -m venv")]
    assert main(shlex.split(line.split("bin/mlx-audio-native ")[1])) == 0
    assert (tmp_path / "kick.wav").is_file()


def test_every_command_is_in_the_table():
    from mlx_audio_native.cli import COMMANDS as KNOWN

    table = README.read_text(encoding="utf-8")
    for command in KNOWN:
        assert f"`mlx-audio-native {command.name}" in table
