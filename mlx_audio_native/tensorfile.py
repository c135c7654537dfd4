"""Safetensors files: header checked on opening, tensors read on demand, weight norm fused; written in a fixed order.

One tensor is in memory at a time, however large the file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import WeightsError

PACKED = "U32"
# the dtypes that weights may have, and how their bytes are read: NumPy knows no bfloat16
_READ_AS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, PACKED: np.uint32}
_WRITTEN_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": PACKED}
# of a float's bits: all but its sign, and infinity, from which on they say infinite or NaN
_FINITE = {
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
}
_CACHED = 1 << 16
# what torch's weight_norm leaves for a `weight`, before and after it became a parametrization: magnitude, direction
_WEIGHT_NORM = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


class Stored(NamedTuple):
    """A tensor of a file, or one made of several. `dtype` is safetensors' name for what `read` gives.

    `read` raises WeightsError if that is no weight's dtype, or if a value is not finite.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], mx.array]
    made_of: int = 1

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(_READ_AS[self.dtype]).itemsize


class _Scratch:
    """Memory that is read into again and again: fresh pages cost more than the reading."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def room(self, size: int) -> np.ndarray:
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]


def open_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, weight-norm pairs as the weight they make. Raises WeightsError."""
    try:
        # safe_open checks the header: every tensor lies inside the file and has the bytes its shape needs
        with open(path, "rb") as file, safe_open(path, framework="np"):
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from None
    header.pop("__metadata__", None)
    stored, scratch = {}, _Scratch()
    for name, entry in header.items():
        start = 8 + length + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        read = partial(_read, path, name, entry["dtype"], shape, start, scratch)
        stored[name] = Stored(path, entry["dtype"], shape, read)
    return _fuse_weight_norm(stored, path)


def _read(path: Path, name: str, dtype: str, shape: tuple[int, ...], start: int, scratch: _Scratch) -> mx.array:
    if dtype not in _READ_AS:
        raise WeightsError(f"tensor {name!r} in {path} is {dtype}, expected one of {', '.join(_READ_AS)}")
    values = scratch.room(prod(shape) * np.dtype(_READ_AS[dtype]).itemsize).view(_READ_AS[dtype])
    with open(path, "rb") as file:
        file.seek(start)
        if file.readinto(values.data) != values.nbytes:
            raise WeightsError(f"{path} became shorter while it was read")
    if dtype != PACKED and not _is_finite(values, dtype):
        raise _not_finite(name, path, dtype)
    array = mx.array(values.reshape(shape))
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_finite(array: mx.array, name: str, path: Path) -> None:
    """Raise WeightsError if a float array holds an infinity or NaN."""
    dtype = _WRITTEN_AS[str(array.dtype).split(".")[-1]]
    values = np.asarray(array.reshape(-1).view(mx.uint32 if dtype == "F32" else mx.uint16))
    if not _is_finite(values, dtype):
        raise _not_finite(name, path, dtype)


def _is_finite(values: np.ndarray, dtype: str) -> bool:
    """By the bits, a cacheful at a time: 20 times as fast as asking for each value on a CPU."""
    kind, magnitude, infinite = _FINITE[dtype]
    bits = values.view(kind)
    chunks = (bits[start : start + _CACHED] for start in range(0, len(bits), _CACHED))
    return all((chunk & magnitude).max() < infinite for chunk in chunks)


def _not_finite(name: str, path: Path, dtype: str) -> WeightsError:
    written = next(known for known, short in _WRITTEN_AS.items() if short == dtype)
    return WeightsError(f"tensor {name!r} in {path} has values that are not finite in {written}")


def _fuse_weight_norm(stored: dict[str, Stored], path: Path) -> dict[str, Stored]:
    """Replace magnitude and direction by `g·v/‖v‖` in float32, the norm over all but the first axis."""
    for magnitude, direction in _WEIGHT_NORM:
        for name in [name for name in stored if name.endswith(f".{direction}")]:
            layer = name.removesuffix(direction)
            g, v = stored.get(layer + magnitude), stored[name]
            if g is None or layer + "weight" in stored:
                continue  # a half pair, or the weight twice: left for the strict check to name
            expected = v.shape[:1] + (1,) * (len(v.shape) - 1)
            if g.shape != expected:
                raise WeightsError(f"tensor {layer + magnitude!r} in {path} is {g.shape}, expected {expected}")
            read = partial(_fused, g, v, layer + "weight")
            stored[layer + "weight"] = Stored(path, "F32", v.shape, read, made_of=2)
            del stored[layer + magnitude], stored[name]
    return stored


def _fused(g: Stored, v: Stored, name: str) -> mx.array:
    magnitude, direction = g.read().astype(mx.float32), v.read().astype(mx.float32)
    axes = tuple(range(1, direction.ndim))
    weight = magnitude * (direction / mx.sqrt(mx.square(direction).sum(axes, keepdims=True)))
    require_finite(weight, name, v.file)
    return weight


def write_tensors(path: Path, tensors: Mapping[str, mx.array | np.ndarray | Stored]) -> None:
    """Write a safetensors file; equal tensors give equal bytes, whatever their order. Floats, and packed bits.

    One tensor is asked for at a time, so that a mapping that makes them on demand need not hold them all; a Stored is
    read when its turn comes. Raises WeightsError, before anything is written if there is no room for all.
    """
    found = {name: described(name, tensor) for name, tensor in tensors.items()}
    # the widest dtype first, so that every tensor is aligned
    names = sorted(found, key=lambda name: (found[name][0] not in ("F32", PACKED), name))
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name in names:
        dtype, shape, size = found[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    free = shutil.disk_usage(path.parent).free
    if end > free:
        raise WeightsError(f"no room for {path.name}: it takes {end / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = tensors[name]
            array = tensor.read() if isinstance(tensor, Stored) else tensor
            if described(name, array) != found[name]:
                raise WeightsError(f"tensor {name!r} was {found[name][:2]}, and came as {described(name, array)[:2]}")
            array = np.asarray(array.view(mx.uint16) if found[name][0] == "BF16" else array)
            file.write(np.ascontiguousarray(array).data)


def described(name: str, tensor: mx.array | np.ndarray | Stored) -> tuple[str, tuple[int, ...], int]:
    """safetensors' name of the dtype, shape, bytes. Raises WeightsError for a dtype that is none of a weight's."""
    if isinstance(tensor, Stored):
        return tensor.dtype, tensor.shape, tensor.nbytes
    dtype = str(tensor.dtype).split(".")[-1]
    if dtype not in _WRITTEN_AS:
        raise WeightsError(f"tensor {name!r} is {dtype}; weights are written as {', '.join(_WRITTEN_AS)}")
    return _WRITTEN_AS[dtype], tuple(tensor.shape), tensor.nbytes
