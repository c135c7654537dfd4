"""A model folder's weights: read strictly, saved whole or not at all.

Every tensor of a part that is asked for is used, or ignored by name with a reason; every parameter is filled.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .blas import keep_freed_memory, prefer_openblas
from .conditioning import Conditioner
from .config import PARTS, TEXT_ENCODER, ModelConfig, read_config
from .dit import DiT
from .errors import ConfigError, InputError, TokenizerError, WeightsError
from .names import PREFIXES, Entry, entries, number_prefix, t5_prefix
from .oobleck import Autoencoder
from .schema import nearest
from .tensorfile import PACKED, Stored, open_tensors, write_tensors
from .tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_REFERENCE_FREQUENCIES = 128
_NAMED = 12  # of tensors without a place
_AHEAD = 4
# ignored: the rotary buffer follows from the head size, and of T5 only the encoder is used
_INV_FREQ = "model.model.transformer.rotary_pos_emb.inv_freq"
_T5_DECODER = ("decoder.", "lm_head.")


@dataclass(frozen=True)
class Parts:
    """What was asked for of a model folder. The rest is None, as is the tokenizer where there is no spiece.model."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    conditioner: Conditioner | None
    dit: DiT | None
    autoencoder: Autoencoder | None


def load_parts(
    folder: Path | str,
    parts: Sequence[str] = PARTS,
    dtype: str | None = None,
    text_encoder: Path | None = None,
) -> Parts:
    """Load a model folder, whose T5 may lie elsewhere, in `text_encoder`.

    `dtype` float32, float16 or bfloat16 is that of the DiT and the autoencoder; None means float16 on a GPU and float32
    on the CPU, where half precision is slow. The conditioner is always float32.
    Raises ConfigError, TokenizerError or WeightsError.
    """
    folder = Path(folder)
    text_encoder = text_encoder or folder / TEXT_ENCODER
    config, modules, stored = _open(folder, parts, text_encoder)
    fill(modules, stored, dtype)
    tokenizer = _find_tokenizer((folder, text_encoder), config) if config.conditioning else None
    return Parts(config, tokenizer, *(modules.get(part) for part in PARTS))


def fill(modules: Mapping[str, nn.Module], stored: Mapping[str, Stored], dtype: str | None = None) -> None:
    """Load tensors, whose names and shapes fit, into parts; `dtype` as in `load_parts`. Raises as that does."""
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}, expected {', '.join(_DTYPES)}{nearest(dtype, list(_DTYPES))}")
    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        keep_freed_memory()
    for part, module in modules.items():
        default = mx.float32 if on_cpu or part == "conditioner" else mx.float16
        wanted = _DTYPES[dtype] if dtype and part != "conditioner" else default
        module.load_weights(list(_read(entries(module), stored, wanted)), strict=True)
        if on_cpu and not prefer_openblas():
            module.apply_to_modules(_suit_plain_blas)


def read_tensors(folder: Path | str, parts: Sequence[str] = PARTS) -> dict[str, mx.array]:
    """A folder's tensors under their names in a model folder, weight norm fused; checked as `load_parts` does."""
    _, modules, stored = _open(Path(folder), parts, Path(folder) / TEXT_ENCODER)
    return {entry.source: stored[entry.source].read() for module in modules.values() for entry in entries(module)}


def save(
    folder: Path | str,
    config: dict[str, Any],
    tensors: Mapping[str, mx.array | np.ndarray | Stored],
    spiece: Path | str | None = None,
    overwrite: bool = False,
    others: Mapping[str, Path] | None = None,
) -> None:
    """Write a model folder, whole or not at all, also when interrupted.

    `config` is the model config as JSON; `tensors` go by their names in a model folder, weight norm fused, and are all
    that the config asks for of the parts they belong to; `others` are files to put beside them, by name. Raises
    InputError for a folder that exists, unless `overwrite`, and ConfigError or WeightsError.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists already; ask for it to be overwritten, or choose another name")
    parts = [part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in tensors)]
    shapes = {name: tuple(array.shape) for name, array in tensors.items()}
    place(ModelConfig.from_dict(config, parts), shapes, lambda name: "what is to be saved")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            write_tensors(new / WEIGHTS, tensors)
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name, path in {**(others or {}), **({} if spiece is None else {"spiece.model": spiece})}.items():
                shutil.copyfile(path, new / name)
            try:
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
            except BaseException:
                if old.exists():
                    old.rename(folder)
                raise
    except OSError as error:
        raise WeightsError(f"cannot write {folder}: {error.strerror or error}") from None


def _open(
    folder: Path, parts: Sequence[str], text_encoder: Path
) -> tuple[ModelConfig, dict[str, nn.Module], dict[str, Stored]]:
    """Config, unfilled modules and stored tensors of the parts. Names and shapes are checked, nothing big is read."""
    main = t5_file = folder / WEIGHTS
    refuse_pickles(folder)
    config = read_config(folder, parts, text_encoder)
    stored = open_checkpoint(folder)
    t5 = t5_prefix(config.prompt.id) if config.conditioning else None
    if t5 and not any(name.startswith(t5) for name in stored):
        t5_file = text_encoder / WEIGHTS
        stored |= {t5 + name: tensor for name, tensor in open_text_encoder(text_encoder).items()}
    others = tuple(prefix for part, prefix in PREFIXES.items() if part not in parts)
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith(others)}
    if t5:
        drop_tied_copy(stored, t5)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    modules = place(config, shapes, lambda name: t5_file if t5 and name.startswith(t5) else main)
    return config, modules, stored


def open_checkpoint(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's model.safetensors that carry weights. Raises WeightsError."""
    refuse_pickles(folder)
    stored = open_tensors(folder / WEIGHTS)
    stored.pop(_INV_FREQ, None)
    return stored


def open_text_encoder(folder: Path) -> dict[str, Stored]:
    """The encoder's tensors of a Hugging Face T5's folder, under its own names. Raises WeightsError."""
    main = folder / WEIGHTS
    refuse_pickles(folder)
    if not main.is_file():
        raise WeightsError(
            f"no text encoder here: put T5's config.json, model.safetensors and spiece.model into {folder}"
        )
    stored = {name: tensor for name, tensor in open_tensors(main).items() if not name.startswith(_T5_DECODER)}
    drop_tied_copy(stored, "")
    return stored


def refuse_pickles(folder: Path) -> None:
    """Raise WeightsError for a folder whose weights are a pickle alone, or for a pickle itself."""
    found = [folder] if folder.is_file() else [] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*"))
    for path in found:
        if path.suffix in _PICKLES:
            raise WeightsError(
                f"{path} is a pickle, which can run code when it is read; use the model.safetensors that its publisher "
                "offers beside it, or make one in a sandbox with torch.load(…, weights_only=True) and "
                "safetensors.torch.save_file"
            )


def drop_tied_copy(stored: dict[str, Stored], t5: str) -> None:
    """Ignore a second copy of T5's table, if it equals the first; `t5` is what stands before its names."""
    name = f"{t5}encoder.embed_tokens.weight"
    table, copy = stored.get(f"{t5}shared.weight"), stored.get(name)
    if table and copy and table.shape == copy.shape and mx.array_equal(table.read(), copy.read()).item():
        del stored[name]


def build(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Module]:
    """An unfilled module for each part that the config was read for.

    How many frequencies a number has, only its shapes say: the reference's many if there are none.
    """
    modules: dict[str, nn.Module] = {}
    if config.conditioning:
        found = {number.id: shapes.get(number_prefix(number.id) + "0.weights", ()) for number in config.numbers}
        frequencies = {id_: shape[0] if len(shape) == 1 else _REFERENCE_FREQUENCIES for id_, shape in found.items()}
        modules["conditioner"] = Conditioner(config.conditioning, frequencies)
    if config.dit:
        modules["dit"] = DiT(config.dit)
    if config.autoencoder:
        modules["autoencoder"] = Autoencoder(config.autoencoder)
    return modules


def place(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: Callable[[str], object]
) -> dict[str, nn.Module]:
    """The config's parts, unfilled, for which tensors of these names and shapes are exactly what is needed.

    `where` says for an error where a name belongs. Raises WeightsError.
    """
    modules = build(config, shapes)
    if config.quantization:
        for part, module in modules.items():
            config.quantization.apply(part, module)
    _check([entry for module in modules.values() for entry in entries(module)], shapes, where)
    return modules


def _check(expected: Iterable[Entry], shapes: Mapping[str, tuple[int, ...]], where: Callable[[str], object]) -> None:
    """Refuse tensors that are missing, of another shape, or without a place; `where` says where a name belongs."""
    wanted = {entry.source: entry.shape for entry in expected}
    missing = [name for name in wanted if name not in shapes]
    unknown = [name for name in shapes if name not in wanted]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        near = nearest(missing[0], unknown)
        name = missing[0]
        raise WeightsError(f"{where(name)} lacks the tensor {name!r}, expected {wanted[name]}{others}{near}")
    if unknown:
        named = ", ".join(map(repr, unknown[:_NAMED]))
        others = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        raise WeightsError(f"{where(unknown[0])} has tensors for which this model has no place: {named}{others}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise WeightsError(f"tensor {name!r} in {where(name)} is {shapes[name]}, expected {shape}")


def _read(wanted: Iterable[Entry], stored: Mapping[str, Stored], dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Parameters by name. While one is checked, the next ones are being read."""
    ahead: deque[tuple[Entry, Stored, list[mx.array]]] = deque()
    try:
        for entry in wanted:
            tensor = stored[entry.source]
            ahead.append((entry, tensor, _convert(entry, tensor, dtype)))
            mx.async_eval(ahead[-1][2])
            if len(ahead) > _AHEAD:
                yield _checked(*ahead.popleft())
        while ahead:
            yield _checked(*ahead.popleft())
    finally:  # after an error, no reading goes on: it would fail where nobody expects it if the file then changes
        mx.eval([arrays for _, _, arrays in ahead])


def _convert(entry: Entry, tensor: Stored, dtype: mx.Dtype) -> list[mx.array]:
    """Unevaluated: what is to be checked for a parameter, itself last."""
    if (tensor.dtype == PACKED) != entry.packed:
        expected = PACKED if entry.packed else "a float"
        raise WeightsError(f"tensor {entry.source!r} in {tensor.file} is {tensor.dtype}, expected {expected}")
    array = tensor.fetch()
    if entry.packed:
        return [array]
    dtype = mx.float32 if entry.exact else dtype
    if not entry.convert:
        return [array.astype(dtype)]
    value = mx.contiguous(entry.convert(array.astype(mx.float32)).astype(dtype))
    # kernels are turned round; the snakes' vectors are computed, and may come out finite from what was not
    return [value] if array.ndim > 1 else [array, value]


def _checked(entry: Entry, tensor: Stored, arrays: list[mx.array]) -> tuple[str, mx.array]:
    for array in arrays:
        tensor.require_finite(array)
    return entry.target, arrays[-1]


def _suit_plain_blas(_: str, module: nn.Module) -> None:
    """Turn a dense weight's memory round: a BLAS that does not pack multiplies by its transpose twice as fast then."""
    if isinstance(module, nn.Linear):
        module.weight = mx.contiguous(module.weight.T).T
        mx.eval(module.weight)


def _find_tokenizer(folders: Sequence[Path], config: ModelConfig) -> Tokenizer | None:
    paths = [path for folder in folders if (path := folder / "spiece.model").is_file()]
    return read_tokenizer(paths[0], config) if paths else None


def read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """A model's tokenizer. Raises TokenizerError, also for one that knows more pieces than T5."""
    tokenizer, rows = Tokenizer(path, config.prompt.encode_length), config.prompt.t5_config.vocab_size
    if len(tokenizer) > rows:
        raise TokenizerError(f"{path} has {len(tokenizer)} pieces, T5's table only {rows} rows")
    return tokenizer
