"""Which BLAS MLX calls on Linux, and what is said where MLX has no back end. Each in a process of its own."""

import ctypes.util
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_audio_native.blas import SWITCH

MATMUL_SECONDS = """
import time, mlx_audio_native, mlx.core as mx
a = mx.random.normal((640, 640))
def run():
    start = time.perf_counter()
    mx.eval(a @ a)
    return time.perf_counter() - start
print(min(run() for _ in range(4)))
"""

PAGE_FAULTS = """
import resource, mlx_audio_native, mlx.core as mx
from mlx_audio_native.blas import keep_freed_memory
{}
x = mx.ones((4, 1 << 20))
def run():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        mx.eval(mx.stack([x + 1, x + 2]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(run() for _ in range(4)))
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.skipif(
    sys.platform != "linux" or ctypes.util.find_library("openblas") is None, reason="OpenBLAS is not installed"
)
def test_an_installed_openblas_is_used_unless_switched_off():
    seconds = {switch: float(run_python(MATMUL_SECONDS, **{SWITCH: switch}).stdout) for switch in ("1", "0")}
    assert seconds["1"] < seconds["0"] / 3, seconds


@pytest.mark.skipif(
    sys.platform != "linux" or mx.default_device() != mx.cpu, reason="memory comes from elsewhere there"
)
def test_freed_memory_is_used_again():
    faults = [int(run_python(PAGE_FAULTS.format(first)).stdout) for first in ("", "keep_freed_memory()")]
    assert faults[1] < faults[0] / 10, faults


@pytest.mark.parametrize(("own", "found"), [({}, "0"), ({"MLX_ENABLE_CACHE_THRASHING_CHECK": "1"}, "1")])
def test_cuda_does_not_give_up_after_many_shapes(monkeypatch, own, found):
    monkeypatch.delenv("MLX_ENABLE_CACHE_THRASHING_CHECK", raising=False)
    command = "import os, mlx_audio_native; print(os.environ['MLX_ENABLE_CACHE_THRASHING_CHECK'])"
    assert run_python(command, **own).stdout == f"{found}\n"


@pytest.mark.parametrize("program", ["mlx_audio_native", "golden"])
@pytest.mark.parametrize(("own", "found"), [({}, "0"), ({"MLX_USE_CUDA_GRAPHS": "1"}, "1")])
def test_programs_launch_directly(monkeypatch, program, own, found):
    monkeypatch.delenv("MLX_USE_CUDA_GRAPHS", raising=False)
    tell = "atexit.register(lambda: print(os.environ['MLX_USE_CUDA_GRAPHS']))"
    command = f"import atexit, os, runpy; {tell}; runpy.run_module('{program}', run_name='__main__')"
    assert run_python(command, **own).stdout == f"{found}\n"


def test_no_back_end_is_said_in_one_line(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    command = "import sys; from mlx_audio_native.cli import main; sys.exit(main(['generate', 'kick']))"
    result = run_python(command, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "pip install '.[cpu]'" in result.stderr
