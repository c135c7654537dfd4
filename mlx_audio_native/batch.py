"""Many clips from a list, a line of JSON each, and a manifest of them; what is there already is not made again.

Processes that share a list exchange nothing but their number: each makes every n-th clip, and one that finds all there
when it has made its own writes the manifest. So none waits for another, and none hangs when another dies.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from .audio import Recipe, check_output, file_stem, new_file, read_recipe
from .errors import AudioFileError, InputError, MlxAudioError
from .model import Model, load
from .schema import Section
from .tensorfile import sha256

MANIFEST = "manifest.jsonl"
# without a dot or a slash, a name can neither hide nor leave the folder
_NAME = re.compile(r"\w[\w +#,()-]*")
_LONGEST_NAME = 200
_OPTIONS = {
    "seconds": float,
    "steps": int,
    "cfg_scale": float,
    "negative_prompt": str,
    "sampler": str,
    "init_audio": str,
    "noise_level": float,
    "trim": bool,
    "bars": int,
    "bpm": float,
}


@dataclass(frozen=True)
class Line:
    """A line of a list: `where` it stands, for errors, and what `Model.generate` takes, the seed among it."""

    where: str
    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A clip to be: its file, and the recipe that the file will hold, but for the peak scaling."""

    line: Line
    path: Path
    recipe: Recipe

    def is_there(self) -> bool:
        """Whether the file is. Raises AudioFileError if another is in its place."""
        if not self.path.exists():
            return False
        there = replace(read_recipe(self.path), peak_scale=self.recipe.peak_scale)
        for name in (field.name for field in fields(Recipe)):
            found, wanted = getattr(there, name), getattr(self.recipe, name)
            if found != wanted:
                problem = f"{self.path} is there with {name} {found!r:.60}, not {wanted!r:.60}"
                raise AudioFileError(f"{problem}: choose another name, or --overwrite")
        return True


def run(
    model: str | Path | None,
    path: Path,
    output: Path,
    batch_size: int = 1,
    overwrite: bool = False,
    compile: bool = False,
) -> list[str]:
    """Make the clips of the list `path` in the folder `output`. Returns lines that tell what was done.

    `batch_size` clips are made at once, which may change their last bits, as may `compile`. A file of a clip's name but
    of another recipe is an error, or replaced if `overwrite`. Raises MlxAudioError, before anything is made if a line
    is wrong.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {batch_size}")
    lines = read_lines(path)
    rank, size = _join()
    with warnings.catch_warnings():
        if rank:  # each checks all lines; one tells
            warnings.simplefilter("ignore")
        loaded = load(model)
        if compile:
            loaded.compile()
        targets = [_target(loaded, line, output) for line in lines]
        missing = {target.path for target in _missing(targets, overwrite)}
        _make_folder(output, targets)
        own = [target for target in targets[rank::size] if target.path in missing]
        warnings.simplefilter("ignore")  # all was told when the lines were checked
        # the launcher's pipes are no terminal, but lead to one
        with tqdm(total=len(own), unit="clip", disable=None if size == 1 else rank > 0) as bar:
            _make(loaded, own, batch_size, overwrite, bar)
    who = f"process {rank + 1} of {size}: " if size > 1 else ""
    done = [f"{who}{len(own)} clips made, {len(targets[rank::size]) - len(own)} were there"]
    if not _missing(targets, overwrite):
        write_manifest(targets, output)
        done.append(f"{output / MANIFEST}: {len(targets)} clips")
    return done


def read_lines(path: Path) -> list[Line]:
    """The lines of a list. Raises InputError, with the number of the line that is wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    lines: list[Line] = []
    first: dict[str, Line] = {}
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        where = f"line {number}"
        try:
            line = _read_line(text, where, path.parent)
            # file systems of a Mac take names that differ in case or composition alone for the same
            other = first.setdefault(unicodedata.normalize("NFC", line.name).casefold(), line)
            if other is not line:
                raise InputError(f"the name {line.name!r} of {where} is that of {other.where}: give it one of its own")
        except (MlxAudioError, ValueError, RecursionError) as error:
            problem = error if isinstance(error, MlxAudioError) else f"{where} is not JSON: {error}"
            raise InputError(f"{path}: {problem}") from None
        lines.append(line)
    if not lines:
        raise InputError(f"{path} names no clip")
    return lines


def _read_line(text: bytes, where: str, folder: Path) -> Line:
    values = json.loads(text.decode(), object_pairs_hook=_object)
    section = Section(values, where)
    options = {"prompt": section.take("prompt", str)}
    options |= {key: section.take(key, kind, None) for key, kind in _OPTIONS.items()}
    inpaint = section.many("inpaint", float, ())
    options["inpaint"] = inpaint if "inpaint" in values else None
    name = section.take("name", str, file_stem(options["prompt"]))
    if not _NAME.fullmatch(name) or len(name.encode()) > _LONGEST_NAME:
        rule = f"letters, digits, spaces and _ + # , ( ) -, at most {_LONGEST_NAME} bytes, from a letter or digit on"
        raise InputError(f"{where}.name {name!r:.60} cannot name a file: it takes {rule}")
    # not drawn: the same list makes the same clips
    options["seed"] = section.take("seed", int, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    section.done()
    if source := options["init_audio"]:
        if not source.isprintable():
            raise InputError(f"{where}.init_audio cannot name a file, found {source!r:.60}")
        options["init_audio"] = folder / source
    return Line(where, name, {key: value for key, value in options.items() if value is not None})


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return {key: value for key, value in pairs if value is not None}  # null is as good as absent


def _join() -> tuple[int, int]:
    """This process's number and how many there are: more than one under `mlx.launch`."""
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise MlxAudioError(f"cannot join the launcher's other processes: {error}") from None
    return group.rank(), group.size()


def _target(model: Model, line: Line, output: Path) -> Target:
    try:
        return Target(line, output / f"{line.name}.wav", model.recipe(**line.options))
    except MlxAudioError as error:
        raise InputError(f"{line.where}: {error}") from None


def _missing(targets: Sequence[Target], overwrite: bool) -> list[Target]:
    """Clips that are to be made. Raises AudioFileError for a file that is another, unless that is to be replaced."""
    missing = []
    for target in targets:
        try:
            if not target.is_there():
                missing.append(target)
        except AudioFileError as error:
            if not overwrite:
                raise AudioFileError(f"{target.line.where}: {error}") from None
            missing.append(target)
    return missing


def _make_folder(output: Path, targets: Sequence[Target]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AudioFileError(f"cannot make the folder {output}: {error.strerror}") from None
    for target in targets:
        check_output(target.path, overwrite=True)


def _make(model: Model, targets: Sequence[Target], batch_size: int, overwrite: bool, bar: tqdm) -> None:
    for _, group in groupby(targets, lambda target: _common(target.line.options)):
        together = list(group)
        for start in range(0, len(together), batch_size):
            batch = together[start : start + batch_size]
            recipes = [target.recipe for target in batch]
            common = _common(batch[0].line.options)
            # bars say how long a loop is, alone
            seconds = None if "bars" in common else [recipe.seconds for recipe in recipes]
            prompts, seeds = [target.line.options["prompt"] for target in batch], [recipe.seed for recipe in recipes]
            clips = model.generate(prompts, seconds, seed=seeds, **common)
            for target, clip in zip(batch, clips, strict=True):
                clip.save(target.path, overwrite)
                bar.update()


def _common(options: dict[str, Any]) -> dict[str, Any]:
    """What clips that are made at once share."""
    return {key: value for key, value in options.items() if key not in ("prompt", "seconds", "seed")}


def write_manifest(targets: Sequence[Target], output: Path) -> None:
    """A line of JSON a clip, in the list's order: name, file, sha256, recipe. Removes what killed processes left."""
    for part in output.glob(f".{'[0-9a-f]' * 8}.part"):
        part.unlink(missing_ok=True)
    lines = []
    for target in targets:
        values = {"name": target.line.name, "file": target.path.name, "sha256": sha256(target.path)}
        values["recipe"] = asdict(read_recipe(target.path))
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    try:
        with new_file(output / MANIFEST) as part:
            part.write_text("".join(lines), encoding="utf-8")
    except AudioFileError as error:
        # another process that found all there removed the new file as a remainder: it writes the same after that
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
