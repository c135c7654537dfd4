"""Records golden files: of model folders by the reference, of TFLite files by the LiteRT interpreter."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from mlx_audio_native.errors import InputError

from .recording import PARITY, GoldenError, Recording, hold

DEMO = Path(__file__).parent.parent / "mlx_audio_native" / "demo"


def record(folder: Path) -> Recording:
    """Of a folder with TFLite files, what they give; of a model folder, what the reference gives."""
    if any(folder.glob("*.tflite")):
        from .record_tflite import record
    else:
        from .record_torch import record
    return record(folder)


def drift(fresh: Recording, stored: Recording) -> list[str]:
    """How a fresh recording differs from a stored one beyond the bounds, a line each."""
    lines = [
        f"{key} was {stored.provenance.get(key)}, is {fresh.provenance[key]}"
        for key in fresh.provenance
        if key != "versions" and stored.provenance.get(key) != fresh.provenance[key]
    ]
    if fresh.request != stored.request:
        lines.append("what is asked of the model is not what was")
    if fresh.stages != stored.stages:
        lines.append(f"stages were {stored.stages}, are {fresh.stages}")
    for stage in fresh.stages:
        lines += [str(row) for row in hold(fresh.expected(stage), stored.expected(stage)) if not row.ok]
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="default: all that are stored")
    parser.add_argument("golden", type=Path, nargs="?", metavar="GOLDEN", help="the golden file to write")
    parser.add_argument(
        "--full-size", action="store_true", help="first write MODEL_FOLDER: random, of the release's size"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a stored golden file has drifted")


def run(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")  # the reference's, of what torch will no longer have
    if (args.folder is None) != (args.golden is None) or (args.full_size and not args.folder):
        raise GoldenError("give both a folder and a golden file, or neither")
    pairs = [(args.folder, args.golden)] if args.folder else _stored(write=not args.check)
    if args.full_size:
        from . import fixtures

        if args.folder.exists():
            raise InputError(f"{args.folder} exists already")
        fixtures.write(args.folder, fixtures.FULL)
    drifted = False
    for folder, path in pairs:
        fresh = record(folder)
        if not args.check:
            fresh.write(path)
            print(f"{path}: {len(fresh.tensors)} tensors, {path.stat().st_size / 1e6:.2f} MB, of {folder}")
            continue
        lines = drift(fresh, Recording.read(path))
        drifted |= bool(lines)
        print(f"{path}: {'drifted' if lines else 'as recorded, within the bounds'}")
        for line in lines:
            print(f"  {line}")
    return int(drifted)


def _stored(write: bool) -> list[tuple[Path, Path]]:
    """Model folders and the golden files stored of them; the random ones are made anew if they are to be written."""
    from . import fixtures

    if write:
        for name in fixtures.FIXTURES:
            fixtures.write(PARITY / name, name)
    folders = [*(PARITY / name for name in fixtures.FIXTURES), DEMO]
    return [(folder, PARITY / f"{folder.name}.safetensors") for folder in folders]
