"""Lists of clips: strict reading, kills at random moments, several processes under MLX's launcher."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mlx_audio_native import MlxAudioError, read_recipe
from mlx_audio_native.batch import MANIFEST, Line, Target, read_lines, write_manifest
from mlx_audio_native.cli import main

COMMAND = (sys.executable, "-m", "mlx_audio_native", "batch")
LAUNCHER = Path(sysconfig.get_path("scripts")) / "mlx.launch"
PATIENCE = 300


def entries(number):
    words = ("kick", "snare drum", "sine tone", "saw bass, D")
    return [
        {
            "name": f"clip {index}",
            "prompt": words[index % 4],
            "seconds": 0.5 + index % 3 / 4,
            "steps": 2 + index % 5,
            "seed": index,
        }
        for index in range(number)
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def alone(model, lines, folder):
    """Each clip made by a call of its own: names and bytes of the files."""
    folder.mkdir()
    for line in lines:
        options = {key: value for key, value in line.items() if key != "name"}
        model.generate(**options).save(folder / f"{line['name']}.wav")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def manifest(folder):
    return [json.loads(line) for line in (folder / MANIFEST).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def batch(small_folder, tmp_path, monkeypatch):
    """Runs a list in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(lines, *options, output="out"):
        write(Path("list.jsonl"), lines)
        return main(["batch", "list.jsonl", "--output", output, *options, "--model", str(small_folder)])

    return run


def test_each_clip_is_the_clip_made_alone_and_stands_in_the_manifest(batch, small_model, tmp_path, capsys):
    lines = entries(5)
    assert batch(lines) == 0
    out = tmp_path / "out"
    assert contents(out) == alone(small_model, lines, tmp_path / "alone")
    assert capsys.readouterr().out == "5 clips made, 0 were there\nout/manifest.jsonl: 5 clips\n"
    for line, told in zip(lines, manifest(out), strict=True):
        assert told["name"] == line["name"] and told["file"] == f"{line['name']}.wav"
        assert told["sha256"] == hashlib.sha256((out / told["file"]).read_bytes()).hexdigest()
        assert {key: told["recipe"][key] for key in ("prompt", "seed", "steps")}.items() <= line.items()


def test_only_what_is_missing_is_made(batch, tmp_path, capsys):
    lines, out = entries(4), tmp_path / "out"
    assert batch(lines) == 0
    before, told = contents(out), manifest(out)
    (out / "clip 2.wav").unlink()
    (out / ".01234567.part").write_bytes(b"what a killed process left")
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.wav")}
    capsys.readouterr()
    assert batch(lines) == 0
    assert capsys.readouterr().out.startswith("1 clips made, 3 were there\n")
    assert contents(out) == before and manifest(out) == told
    assert all((out / name).stat().st_mtime_ns == times[name] for name in times)


def test_processes_that_end_together_leave_one_manifest(small_model, tmp_path):
    lines = entries(3)
    alone(small_model, lines, tmp_path / "out")
    paths = [tmp_path / "out" / f"{line['name']}.wav" for line in lines]
    targets = [Target(Line("", path.stem, {}), path, read_recipe(path)) for path in paths]
    for _ in range(40):
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(write_manifest, targets, tmp_path / "out") for _ in range(4)]:
                done.result()
        assert [line["name"] for line in manifest(tmp_path / "out")] == [line["name"] for line in lines]
        (tmp_path / "out" / MANIFEST).unlink()
    assert contents(tmp_path / "out").keys() == {path.name for path in paths}


def test_a_changed_line_is_an_error_unless_replaced(batch, tmp_path, capsys):
    lines, out = entries(3), tmp_path / "out"
    assert batch(lines) == 0
    before = contents(out)
    capsys.readouterr()
    lines[1]["seed"] = 77
    lines.append({"prompt": "kick"})
    assert batch(lines) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: line 2: out/clip 1.wav is there with seed 1, not 77:") and error.count("\n") == 1
    assert contents(out) == before
    assert batch(lines, "--overwrite") == 0
    assert capsys.readouterr().out.startswith("2 clips made, 2 were there\n")
    assert read_recipe(out / "clip 1.wav").seed == 77
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} == {"clip 1.wav"}


@pytest.mark.parametrize("content", [b"", b"RIFF", b"text that somebody put there"])
def test_a_strangers_file_is_kept(batch, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip 0.wav").write_bytes(content)
    assert batch(entries(2)) == 1
    assert capsys.readouterr().err.startswith("error: line 1: cannot use out/clip 0.wav")
    assert contents(tmp_path / "out") == {"clip 0.wav": content}


def test_name_and_seed_follow_from_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "Kick drum, 120 BPM!"}, {"prompt": "x", "name": "y"}])
    first, second = read_lines(path)
    assert (first.name, second.name) == ("kick-drum-120-bpm", "y")
    assert first.options["seed"] == int(hashlib.sha256(b"kick-drum-120-bpm").hexdigest()[:8], 16)
    assert [line.options for line in read_lines(path)] == [first.options, second.options]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2 is not JSON"),
        ("\ud800", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[]", "line 2 must be an object"),
        ('{"prompt": "a", "prompt": "b"}', "line 2 is not JSON: a key stands there twice"),
        ("{}", "line 2 lacks 'prompt'"),
        ('{"prompt": 5}', "line 2.prompt must be a string"),
        ('{"prompt": "b", "secnds": 1}', "unknown key 'secnds' in line 2; did you mean 'seconds'?"),
        ('{"prompt": "b", "seconds": "four"}', "line 2.seconds must be a finite number"),
        ('{"prompt": "b", "seconds": NaN}', "line 2.seconds must be a finite number"),
        ('{"prompt": "b", "steps": true}', "line 2.steps must be a whole number"),
        ('{"prompt": "b", "seed": -1}', "line 2: seed must be from 0"),
        ('{"prompt": "b", "seconds": -1}', "line 2: seconds must be above 0"),
        ('{"prompt": "b", "sampler": "eulr"}', "line 2: "),
        ('{"prompt": "b", "inpaint": []}', "line 2: inpaint is about init audio"),
        ('{"prompt": "b", "inpaint": "1,2"}', "line 2.inpaint must be a list"),
        ('{"prompt": "b", "init_audio": "nowhere.wav"}', "line 2: cannot read "),
        ('{"prompt": "b", "init_audio": "b\\u0000"}', "line 2.init_audio cannot name a file"),
        ('{"prompt": "b", "bars": 1}', "line 2: a loop takes a tempo"),
        ('{"prompt": " "}', "line 2: the prompt is empty"),
        ('{"prompt": "a"}', "the name 'a' of line 2 is that of line 1"),
        ('{"prompt": "b", "name": "A"}', "the name 'A' of line 2 is that of line 1"),
        ('{"prompt": "b", "name": "../b"}', "line 2.name '../b' cannot name a file"),
        ('{"prompt": "b", "name": "/b"}', "line 2.name '/b' cannot name a file"),
        ('{"prompt": "b", "name": "..\\\\b"}', "line 2.name "),
        ('{"prompt": "b", "name": ".b"}', "line 2.name "),
        ('{"prompt": "b", "name": ""}', "line 2.name "),
        ('{"prompt": "b", "name": "b\\u0000"}', "line 2.name "),
        ('{"prompt": "b", "name": "b\\n"}', "line 2.name "),
        ('{"prompt": "b", "name": "\\ud800"}', "line 2.name "),
        (json.dumps({"prompt": "b", "name": "b" * 201}), "line 2.name "),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_made(small_folder, tmp_path, capsys, line, problem):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"prompt": "a", "steps": 1}\n' + line.encode(errors="surrogatepass") + b"\n")
    assert main(["batch", str(path), "--output", str(tmp_path / "out"), "--model", str(small_folder)]) == 1
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["list.jsonl"]


def test_a_list_that_cannot_be_read(batch, tmp_path, capsys):
    assert batch([]) == 1
    assert capsys.readouterr().err == "error: list.jsonl names no clip\n"
    with pytest.raises(MlxAudioError, match="cannot read"):
        read_lines(tmp_path)
    assert batch(entries(1), "--batch-size", "0") == 1
    assert batch(entries(1), output="list.jsonl") == 1
    assert os.listdir(tmp_path) == ["list.jsonl"]


def test_clips_made_at_once_are_those_made_alone(batch, small_model, tmp_path):
    lines = [{**line, "steps": 3} for line in entries(5)] + entries(8)[5:]
    assert batch(lines, "--batch-size", "3") == 0
    alone(small_model, lines, tmp_path / "alone")
    for line in lines:
        pair = [tmp_path / folder / f"{line['name']}.wav" for folder in ("out", "alone")]
        (one, _), (other, _) = (soundfile.read(path) for path in pair)
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-4)
        first, second = (replace(read_recipe(path), peak_scale=1.0) for path in pair)
        assert first == second


def test_every_option_of_generate_serves(batch, small_model, tmp_path):
    soundfile.write(tmp_path / "source.wav", np.sin(np.arange(2000) / 5), 1000)
    options = {"init_audio": "source.wav", "seed": 3, "steps": 2}
    lines = [
        {"name": "again", "prompt": "kick", "noise_level": 0.5, **options},
        {"name": "filled", "prompt": "kick", "inpaint": [0.5, 1.5], **options, "noise_level": None},
        {"name": "loop", "prompt": "kick", "bars": 1, "bpm": 240, "seed": 3, "steps": 2},
        {"name": "long", "prompt": "kick", "seconds": 8, "seed": 3, "steps": 2},
        {"name": "guided", "prompt": "kick", "cfg_scale": 2, "negative_prompt": "saw", "sampler": "euler", "seed": 3},
    ]
    assert batch(lines) == 0
    assert contents(tmp_path / "out") == alone(small_model, lines, tmp_path / "alone")
    assert batch(lines, "--batch-size", "4", output="at-once") == 0
    assert contents(tmp_path / "at-once") == contents(tmp_path / "out")


def survives_kills(small_folder, wanted, path, out, kills):
    """Kills a batch at random moments, again and again; nothing but whole clips ever stands there."""
    moments, killed = random.Random(0), 0
    command = [*COMMAND, path, "--output", out, "--model", small_folder]
    for _ in range(kills):
        there = len(list(out.glob("*.wav")))
        # starting takes longest: the clock runs from the first clip on
        goal = there + moments.randrange(len(wanted) // kills)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and len(list(out.glob("*.wav"))) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        assert process.communicate()[1] == b""
        killed += process.returncode == -signal.SIGKILL
        made = {clip.name: clip.read_bytes() for clip in out.glob("*.wav")}
        assert made.items() <= wanted.items()
    assert made and killed > kills // 2
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE)
    assert contents(out) == wanted
    assert len(manifest(out)) == len(wanted)


def test_kills_lose_nothing(small_folder, small_model, tmp_path):
    lines = entries(12)
    wanted = alone(small_model, lines, tmp_path / "alone")
    survives_kills(small_folder, wanted, write(tmp_path / "list.jsonl", lines), tmp_path / "out", kills=3)


@pytest.mark.slow
def test_kills_lose_nothing_of_many(small_folder, small_model, tmp_path):
    lines = entries(200)
    wanted = alone(small_model, lines, tmp_path / "alone")
    survives_kills(small_folder, wanted, write(tmp_path / "list.jsonl", lines), tmp_path / "out", kills=25)


def launch(processes, arguments):
    """A batch under MLX's launcher, over the ring back end; it must be given a stdin that stays open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [LAUNCHER, "-n", str(processes), "--backend", "ring", "-p", str(port), "--", *COMMAND, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([str(part) for part in command], **pipes)


def ends(process):
    try:
        return process.communicate(timeout=PATIENCE)[0].decode()
    finally:
        process.kill()


def shared(small_folder, small_model, tmp_path, number, counts):
    lines = entries(number)
    wanted = alone(small_model, lines, tmp_path / "alone")
    path, told = write(tmp_path / "list.jsonl", lines), None
    for count in counts:
        out = tmp_path / f"by-{count}"
        output = ends(launch(count, [path, "--output", out, "--model", small_folder]))
        for rank in range(count):
            made = len(range(rank, number, count))
            assert f"process {rank + 1} of {count}: {made} clips made, 0 were there" in output, output
        assert contents(out) == wanted
        told = told or manifest(out)
        assert manifest(out) == told and [line["name"] for line in told] == [line["name"] for line in lines]


def test_two_processes_share_a_list(small_folder, small_model, tmp_path):
    shared(small_folder, small_model, tmp_path, 11, [2])


@pytest.mark.slow
def test_two_and_three_processes_share_a_long_list(small_folder, small_model, tmp_path):
    shared(small_folder, small_model, tmp_path, 200, [2, 3])


def children(process):
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, check=True, text=True).stdout
    return [int(pid) for pid, parent in map(str.split, table.splitlines()) if int(parent) == process.pid]


@pytest.mark.skipif(shutil.which("ps") is None, reason="finding the launcher's processes takes ps")
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_dies_holds_up_no_other(small_folder, small_model, tmp_path, victim):
    lines = [{**line, "steps": 12} for line in entries(8)]
    path, out = write(tmp_path / "list.jsonl", lines), tmp_path / "out"
    arguments = [path, "--output", out, "--model", small_folder]
    process = launch(2, arguments)
    deadline = time.monotonic() + PATIENCE
    while not list(out.glob("*.wav")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(children(process)[victim], signal.SIGKILL)
    ends(process)
    assert not (out / MANIFEST).exists()
    ends(launch(2, arguments))
    assert contents(out) == alone(small_model, lines, tmp_path / "alone")
    assert len(manifest(out)) == len(lines)
