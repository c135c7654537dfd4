"""The table of relative positions, whole where the graph has it, and read off the folded bias where it has not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction import ExtractionError
from extraction.relative_bias import recover
from mlx_audio_native.t5 import relative_buckets


def bias_of(table: np.ndarray, length: int, distance: int) -> np.ndarray:
    return table[relative_buckets(length, len(table), distance)].transpose(2, 0, 1).astype(np.float64)


@given(
    length=st.integers(2, 140), shape=st.sampled_from([(32, 128), (16, 64), (8, 32), (32, 64)]), heads=st.integers(1, 3)
)
def test_every_bucket_that_positions_reach_is_exact(length, shape, heads):
    buckets, distance = shape
    table = np.random.default_rng(length).standard_normal((buckets, heads)).astype(np.float32)
    bias = bias_of(table, length, distance)
    found, found_distance, lost = recover(bias, [])
    np.testing.assert_array_equal(bias_of(found, length, found_distance), bias)
    reached = set(relative_buckets(length, len(found), found_distance).reshape(-1).tolist())
    assert set(lost) == set(range(len(found))) - reached and not found[list(lost)].any()
    whole, _, nothing = recover(bias, [np.zeros((4, heads), np.float32), table])
    assert nothing == () and whole is table


@pytest.mark.parametrize(("length", "lost"), [(128, (16,)), (64, (14, 15, 16, 30, 31))])
def test_the_published_buckets_and_what_is_lost_of_them(length, lost):
    table = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    found, distance, unreachable = recover(bias_of(table, length, 128), [])
    assert (found.shape, distance, unreachable) == ((32, 4), 128, lost)


def test_another_bias_is_refused():
    with pytest.raises(ExtractionError, match="no table of relative positions"):
        recover(np.random.default_rng(0).standard_normal((2, 20, 20)), [])
