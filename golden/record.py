"""Records golden files: of model folders by the reference, of TFLite files by the LiteRT interpreter."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .recording import DEMO, PARITY, GoldenError, Recording, bound_of, hold, sha256

DEMO_TFLITE = PARITY.parent / "demo_conditioners_float32.tflite"
EXPORTED = PARITY / "equal_heads"
# the stored goldens of TFLite files, and how `export_model` makes those of the model EXPORTED
EXPORTS: dict[str, dict[str, Any]] = {
    "tflite_whole": {},
    "tflite_lost": {"by_position": True},
    "tflite_int8": {"precision": "int8"},
}
# another release of a tool may write another file: what it computes is what counts
_NO_DRIFT = ("versions", "files")


def record(folder: Path) -> Recording:
    """Of a folder with TFLite files, what they give; of a model folder, what the reference gives."""
    if any(folder.glob("*.tflite")):
        from .record_tflite import record
    else:
        from .record_torch import record
    return record(folder)


def record_files(*paths: Path) -> Recording:
    """Of TFLite files among others."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in paths:
            shutil.copyfile(path, Path(scratch) / path.name)
        return record(Path(scratch))


def record_export(**options: Any) -> Recording:
    """Of the model EXPORTED, by way of TFLite files. `options` are those of `export_model.export`."""
    from .export_model import export

    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) / "exports"
        export(EXPORTED, files, **options)
        recording = record(files)
    tools = ", ".join(f"{name} {version(name)}" for name in ("litert-torch", "torch"))
    exported = {
        "exported from": f"{EXPORTED.name}, model.safetensors {sha256(EXPORTED / 'model.safetensors')}",
        "versions": f"{recording.provenance['versions']}, {tools}",
    }
    return replace(recording, provenance={**recording.provenance, **exported})


def drift(fresh: Recording, stored: Recording) -> list[str]:
    """How a fresh recording differs from a stored one beyond the bounds, a line each."""
    lines = [
        f"{key} was {stored.provenance.get(key)}, is {fresh.provenance.get(key)}"
        for key in fresh.provenance | stored.provenance
        if key not in _NO_DRIFT and stored.provenance.get(key) != fresh.provenance.get(key)
    ]
    if fresh.request != stored.request:
        lines.append("what is asked of the model is not what was")
    if fresh.stages != stored.stages:
        lines.append(f"stages were {stored.stages}, are {fresh.stages}")
    for stage, precision in fresh.stages.items():
        rows = hold(fresh.expected(stage), stored.expected(stage), bound_of(stage, precision))
        lines += [str(row) for row in rows if not row.ok]
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="default: all that are stored")
    parser.add_argument("golden", type=Path, nargs="?", metavar="GOLDEN", help="the golden file to write")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a stored golden file has drifted")


def run(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")  # the reference's, of what torch will no longer have
    if (args.folder is None) != (args.golden is None):
        raise GoldenError("give both a folder and a golden file, or neither")
    jobs = [(args.golden, partial(record, args.folder))] if args.folder else _stored(write=not args.check)
    drifted = False
    for path, record_afresh in jobs:
        fresh = record_afresh()
        if not args.check:
            fresh.write(path)
            print(f"{path}: {len(fresh.tensors)} tensors, {path.stat().st_size / 1e6:.2f} MB", flush=True)
            continue
        lines = drift(fresh, Recording.read(path))
        drifted |= bool(lines)
        print(f"{path}: {'drifted' if lines else 'as recorded, within the bounds'}", flush=True)
        for line in lines:
            print(f"  {line}")
    return int(drifted)


def _stored(write: bool) -> Iterator[tuple[Path, Callable[[], Recording]]]:
    """Each stored golden file and what records it; the random models are written anew before if `write`."""
    from . import export_arm, fixtures

    if write:
        for name in fixtures.FIXTURES:
            fixtures.write(PARITY / name, name)
    yield PARITY / "demo_tflite.safetensors", partial(record_files, DEMO_TFLITE)
    for name in export_arm.EXPORTS:
        files = ("conditioners.tflite", f"dit_{name}.tflite", f"autoencoder_{name}.tflite")
        yield export_arm.ARM / f"{name}.safetensors", partial(record_files, *(export_arm.ARM / file for file in files))
    for name, options in EXPORTS.items():
        yield PARITY / f"{name}.safetensors", partial(record_export, **options)
    for folder in (*(PARITY / name for name in fixtures.FIXTURES), DEMO):
        yield PARITY / f"{folder.name}.safetensors", partial(record, folder)
