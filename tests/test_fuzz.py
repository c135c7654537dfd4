"""Damaged .tflite files: each ends in a model or an ExtractionError, quickly, in little memory, nothing else left."""

import gc
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from extraction import ExtractionError, extract
from extraction.schema import read

DATA = Path(__file__).parent.parent / "golden" / "data"
# the smallest three stand for structure, the others for quantised constants
SEEDS = (
    *("order_litert_float32", "order_onnx2tf_float32", "square_onnx2tf_float32") * 3,
    *("gated_litert_int8", "gated_onnx2tf_float16"),
)
SECONDS = 2.0
MEGABYTE = 2**20
# a whole small graph is recovered and checked in a tenth of a second, a damaged one refused in much less
QUICK, LONG = 250, 20_000


def structure_of(path: Path) -> list[int]:
    """Places of the file's tables and offsets: all that is no constant of some size."""
    data = path.read_bytes()
    constant = bytearray(len(data))
    for tensor in read(path).tensors:
        if tensor.data is not None and len(tensor.data) > 64:
            start = data.find(tensor.data)
            constant[start : start + len(tensor.data)] = b"\1" * len(tensor.data)
    return [place for place, inside in enumerate(constant) if not inside]


def mutate(rng: random.Random, original: bytes, structure: list[int]) -> tuple[str, bytes]:
    """A damaged copy, and what was done to it; most damage is done where the tables lie."""
    data = bytearray(original)
    kind = rng.choice(("bits", "bytes", "offset", "shape", "splice", "truncate", "repeat"))
    if kind == "truncate":
        return kind, bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.choice(structure) if rng.random() < 0.9 else rng.randrange(len(data))
        aligned = min(place & ~3, len(data) - 4)
        if kind == "bits":
            data[place] ^= 1 << rng.randrange(8)
        elif kind == "bytes":
            data[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == "offset":
            data[aligned : aligned + 4] = rng.randrange(len(data) + 64).to_bytes(4, "little")
        elif kind == "shape":
            size = rng.choice((0, 1, -1, 2, 3, 2**16, 2**20, 2**31 - 1, -(2**31), 128, 4096))
            data[aligned : aligned + 4] = size.to_bytes(4, "little", signed=True)
        else:
            source, length = rng.choice(structure) & ~3, rng.choice((4, 8, 16, 64))
            piece = data[source : source + length]
            if kind == "splice":
                data[aligned : aligned + len(piece)] = piece
            else:
                data[aligned:aligned] = piece
    return kind, bytes(data)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Inside, what other tests have imported is no garbage collector's work: a hundred times as much as a case's."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most bytes that the process grew by inside, as the only item of the list; 0 where the system cannot tell."""
    grown = [0]
    if sys.platform != "linux":
        yield grown
        return
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield grown
    grown[0] = _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def outcome(read_damaged: Callable[[], object], size: int, where: str) -> str:
    """How reading a file of `size` bytes ends, "success" or "error", within the bounds of time and memory."""
    start = time.process_time()
    with peak_memory() as grown:
        try:
            read_damaged()
            end = "success"
        except ExtractionError as error:
            end = "error"
            assert "\n" not in error.problem and len(error.problem) < 1000, where
    assert time.process_time() - start < SECONDS, where
    assert grown[0] < 64 * MEGABYTE + 2 * size, f"{where}: {grown[0] / MEGABYTE:.0f} MB"
    return end


@frozen_heap()
def run_cases(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Extract `count` damaged files. Returns how many of them ended how."""
    rng = random.Random(seed)
    originals = {name: (DATA / f"{name}.tflite").read_bytes() for name in SEEDS}
    structures = {name: structure_of(DATA / f"{name}.tflite") for name in originals}
    extract(DATA / f"{SEEDS[0]}.tflite", folder / "warm")  # what is imported at first use is no damaged file's memory
    damaged, output = folder / "damaged.tflite", folder / "model"
    ends = {"success": 0, "error": 0}
    for case in range(count):
        name = rng.choice(SEEDS)
        kind, data = mutate(rng, originals[name], structures[name])
        damaged.write_bytes(data)
        where = f"seed {seed}, case {case}: {name}, {kind}"
        ends[outcome(lambda: extract(damaged, output), len(data), where)] += 1
        assert {item.name for item in folder.iterdir()} <= {"damaged.tflite", "warm", "model"}, where
        if output.exists():
            assert {item.name for item in output.iterdir()} == {"config.json", "model.safetensors"}, where
            shutil.rmtree(output)
    return ends


def test_damaged_files_end_in_a_model_or_an_error(tmp_path):
    ends = run_cases(QUICK, 0, tmp_path)
    assert min(ends.values()) > QUICK // 20, ends  # damage that is never or always noticed would test little


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_files_end_in_a_model_or_an_error(tmp_path, seed):
    run_cases(LONG // 4, seed, tmp_path)
