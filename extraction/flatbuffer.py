"""FlatBuffers tables over a memory map, every offset checked against the file before it is followed.

The layout is that of the FlatBuffers internals document: a table starts with a signed offset back to its vtable, which
holds its own size, the table's size and one 16-bit offset per field. The flatbuffers runtime checks none of it, so the
hostile-file promise of this package rests on the few functions here.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import numpy as np

from .errors import ExtractionError

_IDENTIFIER = b"TFL3"


class File:
    """A read-only memory map whose every access is inside the file. `problem` names the file in errors."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ExtractionError(f"{self.path} is a directory, not a .tflite file")
        try:
            with open(self.path, "rb") as handle:
                self.size = handle.seek(0, 2)
                if self.size == 0:
                    raise ExtractionError(f"{self.path} is empty")
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ExtractionError(f"cannot read {self.path}: {error}") from error
        self.data = memoryview(self._map)
        if self.size < 8 or self.data[4:8] != _IDENTIFIER:
            raise ExtractionError(f"{self.path} is no TFLite file: bytes 4 to 8 are not {_IDENTIFIER.decode()}")

    def root(self) -> Table:
        return Table(self, self.scalar(0, "I"))

    def scalar(self, position: int, code: str) -> int | float | bool:
        size = struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, self.span(position, size))[0]

    def span(self, position: int, size: int) -> memoryview:
        """`size` bytes from `position`. Raises ExtractionError where they are not all inside the file."""
        if position < 0 or size < 0 or position + size > self.size:
            raise ExtractionError(f"{self.path} is damaged: {size} bytes at {position} lie outside its {self.size}")
        return self.data[position : position + size]


class Table:
    """One table of the file; its fields are read by slot, in the order of the schema."""

    __slots__ = ("_size", "_vtable", "_vtable_size", "file", "start")

    def __init__(self, file: File, start: int) -> None:
        self.file, self.start = file, start
        self._vtable = start - int(file.scalar(start, "i"))
        self._vtable_size, self._size = struct.unpack("<HH", file.span(self._vtable, 4))
        if self._vtable_size < 4 or self._size < 4:
            raise ExtractionError(f"{file.path} is damaged: the table at {start} has no size")
        file.span(self._vtable, self._vtable_size)
        file.span(start, self._size)

    def _field(self, slot: int, size: int) -> int | None:
        """The position of a field of `size` bytes, or None where the table leaves it to its default."""
        entry = 4 + 2 * slot
        if entry + 2 > self._vtable_size:
            return None
        offset = int(self.file.scalar(self._vtable + entry, "H"))
        if offset == 0:
            return None
        if offset < 4 or offset + size > self._size:
            raise ExtractionError(f"{self.file.path} is damaged: a field of the table at {self.start} lies outside it")
        return self.start + offset

    def scalar(self, slot: int, code: str, default: int | float | bool = 0) -> int | float | bool:
        position = self._field(slot, struct.calcsize("<" + code))
        return default if position is None else self.file.scalar(position, code)

    def _target(self, slot: int) -> int | None:
        position = self._field(slot, 4)
        return None if position is None else position + int(self.file.scalar(position, "I"))

    def table(self, slot: int) -> Table | None:
        target = self._target(slot)
        return None if target is None else Table(self.file, target)

    def _span(self, slot: int, item: int) -> tuple[int, int]:
        """Position and length of a vector of items of `item` bytes; an absent one has length 0."""
        target = self._target(slot)
        if target is None:
            return 0, 0
        length = int(self.file.scalar(target, "I"))
        self.file.span(target + 4, length * item)
        return target + 4, length

    def bytes(self, slot: int) -> memoryview:
        return self.file.span(*self._span(slot, 1))

    def vector(self, slot: int, dtype: str) -> np.ndarray:
        """A vector of numbers as a view on the file; `dtype` is NumPy's name of a little-endian type."""
        item = np.dtype(dtype)
        position, length = self._span(slot, item.itemsize)
        return np.frombuffer(self.file.span(position, length * item.itemsize), item)

    def tables(self, slot: int, most: int) -> list[Table]:
        """A vector of tables. More than `most` is refused: offsets may repeat, so length is not bounded by content."""
        position, length = self._span(slot, 4)
        if length > most:
            raise ExtractionError(f"{self.file.path} lists {length} entries where at most {most} are believable")
        starts = range(position, position + 4 * length, 4)
        return [Table(self.file, at + int(self.file.scalar(at, "I"))) for at in starts]
