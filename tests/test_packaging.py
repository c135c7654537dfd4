"""What a plain install is and needs, and what importing the package costs."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAVY = {
    "ai-edge-litert",
    "huggingface-hub",
    "jax",
    "litert-torch",
    "soxr",
    "tensorflow",
    "tf-keras",
    "tflite",
    "torch",
    "transformers",
}
REPOSITORY = Path(__file__).parents[1]


def run_python(code: str, python: str = sys.executable) -> str:
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def requirements(name: str, extra: str) -> set[str]:
    """Names of all distributions that an installed one needs, itself included, under one of its extras."""
    found, queue = set(), [(name, extra)]
    while queue:
        entry = queue.pop()
        if entry in found:
            continue
        found.add(entry)
        for line in importlib.metadata.requires(entry[0]) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": entry[1]}):
                wanted = canonicalize_name(requirement.name)
                queue += [(wanted, extra) for extra in {"", *requirement.extras}]
    return {name for name, _ in found}


def test_a_plain_install_needs_nothing_heavy():
    needed = requirements("mlx-audio-native", "cpu")
    assert {"mlx", "numpy", "sentencepiece", "safetensors", "soundfile", "tqdm"} <= needed
    assert not needed & HEAVY
    assert len(needed) <= 15, needed


def test_the_runtime_loads_nothing_heavy(small_folder, tmp_path):
    modules = [f"mlx_audio_native.{path.stem}" for path in (REPOSITORY / "mlx_audio_native").glob("[a-z]*.py")]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
import mlx_audio_native
mlx_audio_native.load({str(small_folder)!r}).generate("kick", seconds=1, steps=1).save({str(tmp_path / "a.wav")!r})
print(" ".join(sys.modules))
"""
    loaded = {name.partition(".")[0] for name in run_python(code).split()}
    assert "mlx" in loaded
    assert not loaded & ({name.replace("-", "_") for name in HEAVY} | {"extraction", "golden", "scipy"})


def test_importing_is_quick_and_reads_no_weights():
    code = """
import sys, time
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
start = time.process_time()
import mlx_audio_native
print(time.process_time() - start)
from mlx_audio_native import load, generate
assert opened and not [path for path in opened if path.endswith((".safetensors", ".model", "config.json"))], opened
"""
    assert min(float(run_python(code)) for _ in range(3)) < 0.5


@pytest.mark.slow
def test_an_installed_wheel_is_whole_and_makes_a_wav(tmp_path):
    """In an environment of its own, from a package registry."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    folder = tmp_path / "venv" / "bin"
    subprocess.run([folder / "pip", "install", "-q", f"{REPOSITORY}[cpu]"], check=True)
    listed = subprocess.run([folder / "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True)
    assert not {line.partition("==")[0] for line in listed.stdout.split()} & HEAVY
    code = "import importlib.metadata as m; print(*m.distribution('mlx-audio-native').files, sep='\\n')"
    files = run_python(code, str(folder / "python")).split()
    held = {name.partition("/")[0] for name in files}
    assert {"mlx_audio_native", "extraction"} <= held and not held & {"golden", "tests"}
    for name in ("py.typed", "demo/config.json", "demo/model.safetensors", "demo/spiece.model"):
        assert f"mlx_audio_native/{name}" in files
    command = [folder / "mlx-audio-native", "generate", "kick drum loop, 120 BPM", "--output", "kick.wav"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=True)
    assert (tmp_path / "kick.wav").stat().st_size == pytest.approx(4 * 44100 * 2 * 3, abs=2000)
