"""A published checkpoint → one model folder that holds everything, weight norm fused, T5 and its tokenizer inside.

Tensors pass through one at a time; the folder appears whole or not at all.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import __version__, hub
from .config import TEXT_ENCODER, ModelConfig, read_config_json
from .errors import ConfigError, InputError
from .model import stage
from .names import Entry, entries, source, t5_prefix
from .quantization import Quantization
from .schema import Section, nearest, read_json
from .t5 import T5Config
from .tensorfile import PACKED, Stored, described, open_tensors, sha256
from .weights import (
    WEIGHTS,
    drop_tied_copy,
    open_checkpoint,
    open_text_encoder,
    place,
    read_tokenizer,
    refuse_pickles,
    save,
)

LICENCE = re.compile(r"(licen[cs]e|notice|copying|readme)[^/\\]*", re.IGNORECASE)
OF_TEXT_ENCODER = f"{TEXT_ENCODER}-"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_LONG = {short: name for name, short in _DTYPES.items()}


@dataclass(frozen=True)
class Recovered:
    """What was read from other files than safetensors: a model config as JSON, tensors by their names in a folder."""

    folder: Path
    files: Sequence[Path]
    config: dict[str, Any]
    tensors: Mapping[str, Stored | np.ndarray]


@dataclass(frozen=True)
class _Origin:
    """A model about to be written: its config as JSON, its tensors, and where they come from. Filled step by step.

    `folders` hold licences, and maybe a tokenizer; `files` are what weights were read from, with a name for each.
    """

    name: str
    values: dict[str, Any]
    stored: dict[str, Stored]
    folders: list[Path]
    files: list[tuple[str, Path]]
    lines: list[str]

    def where(self, name: str) -> Path:
        """The file that a tensor belongs in; T5's comes last."""
        of_t5 = name.startswith(tuple(t5_prefix(entry["id"]) for entry in _prompts(self.values)))
        return self.files[-1 if of_t5 else 0][1]


def convert(
    model: str | Path | Recovered,
    output: Path,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    text_encoder: str | Path | Recovered | None = None,
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a model as the model folder `output`; returns what was done, in lines.

    `model` is a folder or hub id with stable-audio-tools' config and safetensors, or what was recovered elsewhere. The
    T5 is the model's own, unless `text_encoder` is given: Hugging Face's folder of one, its hub id, or what was
    recovered of one. `dtype` None keeps that of each weight; fused weight norm is float32 then. `tokenizer` is a
    spiece.model, by default the one beside T5 or the model. Raises MlxAudioError.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise InputError(f"unknown dtype {dtype!r}, expected {', '.join(_DTYPES)}{nearest(dtype, list(_DTYPES))}")
    _check_output(output, overwrite)
    with stage("reading headers"):
        origin = _recovered(model) if isinstance(model, Recovered) else _checkpoint(hub.resolve(model))
        if output.resolve() in [folder.resolve() for folder in origin.folders]:
            raise InputError(f"{output} is what is to be converted, and is kept")
        _add_text_encoder(origin, text_encoder)
        config = ModelConfig.from_dict(origin.values)
        spiece = _find_tokenizer(tokenizer, origin.folders, config)
        modules = place(config, {name: tensor.shape for name, tensor in origin.stored.items()}, origin.where)
        tensors: dict[str, Stored] = {}
        for part, module in modules.items():
            tensors |= _plan(part, module, origin.stored, dtype, quantization)
        if quantization and not any(quantization.layers(part, module) for part, module in modules.items()):
            raise InputError(f"no layer has rows that divide into groups of {quantization.group_size}")
    with stage("checksums"):
        values = {**origin.values, "provenance": _provenance(origin.files)}
    if quantization:
        values["quantization"] = quantization.as_json()
    with stage("weights"):
        save(output, values, tensors, spiece, overwrite, _licences(origin.folders))
    size = (output / WEIGHTS).stat().st_size
    return [*origin.lines, f"{output}: written, {len(tensors)} tensors, {size / 1e6:.1f} MB"]


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.absolute().parent.is_dir():
        raise InputError(f"cannot write {output}: there is no folder {output.parent}")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise InputError(f"{output} exists already; ask for it to be overwritten, or choose another name")
    if output.is_symlink() or not all((output / name).is_file() for name in ("config.json", WEIGHTS)):
        raise InputError(f"{output} is no model folder, and is kept")


def _checkpoint(folder: Path) -> _Origin:
    refuse_pickles(folder)
    values = read_config_json(folder)
    # before T5 is looked for: a wrong architecture is to be told first
    if ModelConfig.from_dict(values).quantization:
        raise InputError(f"{folder} is quantised already; convert what it was made of")
    stored, main = open_checkpoint(folder), folder / WEIGHTS
    name = hub.name(folder)
    return _Origin(name, values, stored, [folder], [(name, main)], [_accounted(main, stored)])


def _recovered(found: Recovered) -> _Origin:
    name, stored = found.folder.resolve().name, _as_stored(found)
    line = f"{found.folder}: {len(stored)} tensors recovered"
    return _Origin(name, copy.deepcopy(found.config), stored, [found.folder], [(name, f) for f in found.files], [line])


def _as_stored(found: Recovered) -> dict[str, Stored]:
    stored = {}
    for name, tensor in found.tensors.items():
        if not isinstance(tensor, Stored):
            dtype, shape, _ = described(name, tensor)
            tensor = Stored(name, found.files[0], dtype, shape, partial(mx.array, tensor))
        stored[name] = tensor
    return stored


def _accounted(path: Path, used: Mapping[str, Stored]) -> str:
    """What became of the tensors of a file."""
    total = sum(tensor.made_of for tensor in open_tensors(path).values())
    rest = total - sum(tensor.made_of for tensor in used.values())
    return f"{path}: {total - rest} tensors used" + (f", {rest} ignored by name" if rest else "")


def _add_text_encoder(origin: _Origin, text_encoder: str | Path | Recovered | None) -> None:
    """Put T5's tensors and config in; one that is asked for takes the place of the model's own."""
    (prompt,) = _prompts(origin.values)
    prefix = t5_prefix(prompt["id"])
    own = [name for name in origin.stored if name.startswith(prefix)]
    if own and text_encoder is None:
        drop_tied_copy(origin.stored, prefix)
        return
    if isinstance(text_encoder, Recovered):
        (theirs,) = _prompts(text_encoder.config)
        begin = t5_prefix(theirs["id"])
        stored = {n.removeprefix(begin): t for n, t in _as_stored(text_encoder).items() if n.startswith(begin)}
        folder, files, t5_config = text_encoder.folder, text_encoder.files, theirs["config"]["t5_config"]
        name = folder.resolve().name
        origin.lines.append(f"{folder}: {len(stored)} tensors of T5 recovered")
    else:
        folder = hub.resolve(text_encoder) if text_encoder else hub.text_encoder(origin.folders[0])
        if text_encoder is None and not (folder / WEIGHTS).is_file():
            known = prompt["config"].get("t5_model_name", "t5-base")
            raise InputError(f"{origin.name} holds no T5: give --text-encoder, a folder or hub id of {known}")
        stored, files = open_text_encoder(folder), [folder / WEIGHTS]
        t5_config = read_json(folder / "config.json")
        name = hub.name(folder)
        origin.lines.append(_accounted(files[0], stored))
    t5 = T5Config.read(Section(t5_config, f"{folder}: T5's config"))
    _require_same_t5(prompt["config"], t5, folder)
    for own_name in own:
        del origin.stored[own_name]
    origin.stored.update({prefix + key: tensor for key, tensor in stored.items()})
    prompt["config"]["t5_config"] = t5.as_json()
    origin.folders.append(folder)
    origin.files.extend((name, file) for file in files)


def _prompts(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in values["model"]["conditioning"]["configs"] if entry["type"] == "t5"]


def _require_same_t5(prompt: dict[str, Any], t5: T5Config, folder: Path) -> None:
    """The T5 that the model was trained with and the one given differ in no size."""
    if "t5_config" in prompt:
        expected = T5Config.read(Section(prompt["t5_config"], "t5_config"))
    elif "t5_model_name" in prompt:
        expected = T5Config.named(prompt["t5_model_name"])
    else:
        return
    for key, value in expected.as_json().items():
        found = t5.as_json()[key]
        if found != value:
            raise ConfigError(f"{folder} is not the T5 of this model: its {key} is {found!r}, expected {value!r}")


def _find_tokenizer(tokenizer: Path | None, folders: Sequence[Path], config: ModelConfig) -> Path:
    paths = [tokenizer] if tokenizer else [folder / "spiece.model" for folder in reversed(folders)]
    for path in paths:
        if path.is_file():
            read_tokenizer(path, config)
            return path
    raise InputError(f"there is no tokenizer: {' nor '.join(map(str, paths))}; T5's own folder has its spiece.model")


def _plan(
    part: str, module: nn.Module, stored: Mapping[str, Stored], dtype: str | None, quantization: Quantization | None
) -> dict[str, Stored]:
    """A part's tensors as they are to be written, each made when its turn comes."""
    quantised = quantization.layers(part, module) if quantization else []
    planned = {}
    for entry in entries(module):
        tensor = stored[entry.source]
        layer, _, key = entry.target.rpartition(".")
        if key == "weight" and layer in quantised:
            pieces = _quantised(tensor, quantization, dtype)
            planned |= {source(module, f"{layer}.{name}"): piece for name, piece in pieces.items()}
        else:
            planned[entry.source] = _cast(tensor, entry, dtype)
    return planned


def _cast(tensor: Stored, entry: Entry, dtype: str | None) -> Stored:
    wanted = "float32" if entry.exact else dtype
    if dtype is None or tensor.dtype == _DTYPES[wanted]:
        return tensor
    return tensor._replace(dtype=_DTYPES[wanted], fetch=lambda: tensor.fetch().astype(getattr(mx, wanted)))


def _quantised(tensor: Stored, quantization: Quantization, dtype: str | None) -> dict[str, Stored]:
    """The three arrays of a quantised weight, made together when the first of them is asked for."""
    (rows, width), bits, group_size = tensor.shape, quantization.bits, quantization.group_size
    short = _DTYPES[dtype] if dtype else tensor.dtype
    made: dict[str, mx.array] = {}

    def fetch(name: str) -> mx.array:
        if not made:
            made.update(zip(layouts, mx.quantize(tensor.read().astype(mx.float32), group_size, bits), strict=True))
            mx.eval(made)
        array = made.pop(name)
        return array if name == "weight" else array.astype(getattr(mx, _LONG[short]))

    groups = rows, width // group_size
    layouts = {"weight": (PACKED, (rows, width * bits // 32)), "scales": (short, groups), "biases": (short, groups)}
    return {
        name: tensor._replace(dtype=dtype, shape=shape, fetch=partial(fetch, name))
        for name, (dtype, shape) in layouts.items()
    }


def _provenance(files: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """What a folder's weights were made of, and by which version."""
    sources = [{"name": name, "file": path.name, "sha256": sha256(path)} for name, path in files]
    return {"converted_by": f"mlx-audio-native {__version__}", "sources": sources}


def _licences(folders: Sequence[Path]) -> dict[str, Path]:
    """Licences and notices of the model, and of the T5 that came from elsewhere, by the names they get."""
    prefixes = ("", *(OF_TEXT_ENCODER for _ in folders[1:]))
    return {
        prefix + path.name: path
        for prefix, folder in zip(prefixes, folders, strict=True)
        for path in sorted(folder.iterdir())
        if path.is_file() and LICENCE.fullmatch(path.name)
    }
