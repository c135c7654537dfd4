"""Safetensors files: header checked on opening, tensors read on demand, weight norm fused; written in a fixed order."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import WeightsError

# the dtypes that weights may have, and how their bytes are read: NumPy knows no bfloat16
_READ_AS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_WRITTEN_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# what torch's weight_norm leaves for a `weight`, before and after it became a parametrization: magnitude, direction
_WEIGHT_NORM = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


class Stored(NamedTuple):
    """A tensor in a file. `read` gives its values, and raises WeightsError if its dtype is none of a weight's."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], mx.array]


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
    stored = {}
    for name, entry in header.items():
        start = 8 + length + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        stored[name] = Stored(path, entry["dtype"], shape, partial(_read, path, name, entry["dtype"], shape, start))
    return _fuse_weight_norm(stored, path)


def _read(path: Path, name: str, dtype: str, shape: tuple[int, ...], start: int) -> mx.array:
    if dtype not in _READ_AS:
        raise WeightsError(f"tensor {name!r} in {path} is {dtype}, expected one of {', '.join(_READ_AS)}")
    with open(path, "rb") as file:
        file.seek(start)
        values = np.fromfile(file, _READ_AS[dtype], int(np.prod(shape, dtype=np.int64)))
    array = mx.array(values.reshape(shape))
    return array.view(mx.bfloat16) if dtype == "BF16" else array


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
            stored[layer + "weight"] = Stored(path, v.dtype, v.shape, partial(_fused, g, v))
            del stored[layer + magnitude], stored[name]
    return stored


def _fused(g: Stored, v: Stored) -> mx.array:
    magnitude, direction = g.read().astype(mx.float32), v.read().astype(mx.float32)
    axes = tuple(range(1, direction.ndim))
    return magnitude * (direction / mx.sqrt(mx.square(direction).sum(axes, keepdims=True)))


def write_tensors(path: Path, tensors: Mapping[str, mx.array | np.ndarray]) -> None:
    """Write a safetensors file; equal tensors give equal bytes, whatever their order. Floats only.

    One tensor is asked for at a time, so that a mapping that makes them on demand need not hold them all.
    """
    found = {
        name: (str(array.dtype).split(".")[-1], tuple(array.shape), array.nbytes) for name, array in tensors.items()
    }
    for name, (dtype, _, _) in found.items():
        if dtype not in _WRITTEN_AS:
            raise WeightsError(f"tensor {name!r} is {dtype}; weights are written as {', '.join(_WRITTEN_AS)}")
    # the widest dtype first, so that every tensor is aligned
    names = sorted(found, key=lambda name: (found[name][0] != "float32", name))
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name in names:
        dtype, shape, size = found[name]
        header[name] = {"dtype": _WRITTEN_AS[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            array = tensors[name]
            np.asarray(array.view(mx.uint16) if found[name][0] == "bfloat16" else array).tofile(file)
