"""Damaged DiT and autoencoder files: each ends in a model or an ExtractionError, quickly and in little memory."""

import random
import shutil
from pathlib import Path

import pytest
from test_fuzz import frozen_heap, mutate, outcome, structure_of

from extraction import arm

ARM = Path(__file__).parent.parent / "golden" / "data" / "arm"
FILES = ("conditioners", "dit_int8", "autoencoder_float32")
QUICK, LONG = 60, 2500


@frozen_heap()
def run_cases(damaged: str, count: int, seed: int, folder: Path) -> dict[str, int]:
    """Reads a folder `count` times, each time with another damage to one file. Returns how many ended how."""
    rng = random.Random(seed)
    for file in FILES:
        shutil.copyfile(ARM / f"{file}.tflite", folder / f"{file}.tflite")
    arm.read(folder)  # what is imported at first use is no damaged file's memory
    original, structure = (ARM / f"{damaged}.tflite").read_bytes(), structure_of(ARM / f"{damaged}.tflite")
    ends = {"success": 0, "error": 0}
    for case in range(count):
        kind, data = mutate(rng, original, structure)
        (folder / f"{damaged}.tflite").write_bytes(data)
        where = f"seed {seed}, case {case}: {damaged}, {kind}"
        ends[outcome(lambda: arm.read(folder), len(data), where)] += 1
    return ends


@pytest.mark.parametrize("damaged", FILES[1:])
def test_damaged_files_end_in_a_model_or_an_error(damaged, tmp_path):
    ends = run_cases(damaged, QUICK, 0, tmp_path)
    assert min(ends.values()) > QUICK // 20, ends


@pytest.mark.slow
@pytest.mark.parametrize("damaged", FILES[1:])
def test_many_damaged_files_end_in_a_model_or_an_error(damaged, tmp_path):
    run_cases(damaged, LONG, 1, tmp_path)
