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
# the dtypes that weights may have
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, PACKED: 4}
_WRITTEN_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": PACKED}
# of a float's bits: all but its sign, and infinity, from which on they say infinite or NaN
_FINITE = {
    mx.float32: (np.uint32, 0x7FFFFFFF, 0x7F800000),
    mx.float16: (np.uint16, 0x7FFF, 0x7C00),
    mx.bfloat16: (np.uint16, 0x7FFF, 0x7F80),
}
_CACHED = 1 << 16
# what torch's weight_norm leaves for a `weight`, before and after it became a parametrization: magnitude, direction
_WEIGHT_NORM = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


class Stored(NamedTuple):
    """A tensor of a file, or one made of some. `dtype` is safetensors' name for it.

    `fetch` gives it unevaluated and unchecked; it raises WeightsError if the dtype is none of a weight's.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    fetch: Callable[[], mx.array]
    made_of: int = 1

    def read(self) -> mx.array:
        """Its values. Raises WeightsError also if one is not finite."""
        array = self.fetch()
        self.require_finite(array)
        return array

    def require_finite(self, array: mx.array) -> None:
        """Evaluate what became of the tensor; raise WeightsError if a value is not finite."""
        try:
            mx.eval(array)
        except RuntimeError as error:  # such as a file that became shorter meanwhile
            raise WeightsError(f"cannot read tensor {self.name!r} in {self.file}: {error}") from None
        if array.dtype != mx.uint32 and not _is_finite(array):
            dtype = str(array.dtype).split(".")[-1]
            raise WeightsError(f"tensor {self.name!r} in {self.file} has values that are not finite in {dtype}")

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _BYTES[self.dtype]


def _is_finite(array: mx.array) -> bool:
    """By the bits, a cacheful at a time: 20 times as fast as asking for each value on a CPU."""
    kind, magnitude, infinite = _FINITE[array.dtype]
    # viewed by NumPy: anything left for MLX to do would wait for all that is being read ahead
    bits = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).reshape(-1).view(kind)
    chunks = (bits[start : start + _CACHED] for start in range(0, len(bits), _CACHED))
    return all((chunk & magnitude).max() < infinite for chunk in chunks)


class _File:
    """A safetensors file's arrays, each handed out without being kept, so that it lives no longer than it is used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._arrays: dict[str, mx.array] = {}

    def fetch(self, name: str, dtype: str) -> mx.array:
        if dtype not in _BYTES:
            raise WeightsError(f"tensor {name!r} in {self._path} is {dtype}, expected one of {', '.join(_BYTES)}")
        if name not in self._arrays:
            try:
                self._arrays = mx.load(str(self._path), format="safetensors")
            except (RuntimeError, ValueError) as error:
                raise WeightsError(f"cannot read {self._path}: {error}") from None
        return self._arrays.pop(name)


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
    arrays = _File(path)
    stored = {
        name: Stored(name, path, entry["dtype"], tuple(entry["shape"]), partial(arrays.fetch, name, entry["dtype"]))
        for name, entry in header.items()
    }
    return _fuse_weight_norm(stored, path)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
            weight = layer + "weight"
            stored[weight] = Stored(weight, path, "F32", v.shape, partial(_fused, g, v), made_of=2)
            del stored[layer + magnitude], stored[name]
    return stored


def _fused(g: Stored, v: Stored) -> mx.array:
    magnitude, direction = g.fetch().astype(mx.float32), v.fetch().astype(mx.float32)
    axes = tuple(range(1, direction.ndim))
    return magnitude * (direction / mx.sqrt(mx.square(direction).sum(axes, keepdims=True)))


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
