"""T5's relative bias: the table of buckets behind the bias that a graph adds to its scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_audio_native.t5 import relative_buckets

from .errors import ExtractionError

# buckets and distances of a folded bias cannot be read, only tried; the published T5s all have the first pair
_DISTANCES = (128, 64, 256, 32, 512, 16, 1024, 20, 24, 40, 48, 80, 96, 100, 160, 192, 200, 384, 400, 768, 1000, 2048)
_BUCKETS = (32, 16, 64, 8, 128)


def recover(bias: np.ndarray, tables: Sequence[np.ndarray]) -> tuple[np.ndarray, int, tuple[int, ...]]:
    """The table (buckets, heads), its largest distance, and the buckets that could not be recovered and are zeros.

    `bias` is (heads, length, length), exact; `tables` are the graph's constant tables, of which one may be it whole.
    Otherwise the table is read off the bias, and a bucket that no two of `length` positions reach is lost.
    Raises ExtractionError for a bias of another kind.
    """
    heads, length, _ = bias.shape
    for table in tables:
        for distance in _DISTANCES if table.shape[1] == heads and len(table) >= 4 else ():
            if len(table) < 4 * distance and _same(table, distance, bias):
                return table, distance, ()
    found = []
    for buckets, distance in ((b, d) for b in _BUCKETS for d in _DISTANCES if b < 4 * d):
        reached, first = np.unique(relative_buckets(length, buckets, distance), return_index=True)
        table = np.zeros((buckets, heads), np.float32)
        table[reached] = bias.reshape(heads, -1)[:, first].T
        if _same(table, distance, bias):
            found.append((len(reached), table, distance, reached))
    if not found:
        raise ExtractionError("the scores' bias is no table of relative positions in logarithmic buckets")
    # finer buckets than the true ones fit too
    _, table, distance, reached = min(found, key=lambda item: item[0])
    return table, distance, tuple(bucket for bucket in range(len(table)) if bucket not in set(reached.tolist()))


def _same(table: np.ndarray, distance: int, bias: np.ndarray) -> bool:
    return np.array_equal(table[relative_buckets(bias.shape[1], len(table), distance)].transpose(2, 0, 1), bias)
