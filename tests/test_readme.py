"""The README's examples do what they say, with the embedded model."""

import re
import shlex
from pathlib import Path

import pytest

from mlx_audio_native.cli import main

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_python(code, tmp_path):
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert list(tmp_path.glob("*.wav"))
    assert all(len(names[name].samples) for name in ("audio", "loop", "lead"))


def test_commands(tmp_path):
    """In the order in which they stand; what sets an environment up is run by .ci/run."""
    ran = [line for line in COMMANDS if line.startswith("mlx-audio-native ")]
    assert ran
    for line in ran:
        assert main(shlex.split(line)[1:]) == 0, line
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
