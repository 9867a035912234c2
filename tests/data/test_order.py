"""The order of training, against reference and recorded values: runs must stay reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat_ray.data.order import derive_key, global_batch_indices, permute
from nanochat_ray.data.shuffle import assign_shards


def test_keys_are_those_of_splitmix64() -> None:
    # The first output of SplitMix64 with seed 0 (Steele, Lea, Flood, 2014).
    assert derive_key(0) == 0xE220A8397B1DCDAF
    assert derive_key(3, 1) == 0xEC4C5BEE627011B3
    assert derive_key(1, 3) == 0x86D6FD953217AE03


def test_recorded_orders() -> None:
    index = np.arange(10, dtype=np.int64)
    assert permute(index, 10, 7).tolist() == [4, 7, 8, 6, 5, 2, 0, 9, 3, 1]
    assert permute(np.arange(3), 3, 11).tolist() == [2, 1, 0]
    assert permute(np.arange(5), 5, 7).tolist() == [4, 1, 3, 0, 2]
    assert permute(np.arange(64), 64, 7)[:8].tolist() == [47, 11, 49, 1, 31, 61, 16, 19]
    assert global_batch_indices(1, 3, 3, 0).tolist() == [0, 0, 0]
    batches = [global_batch_indices(10, 3, 4, step).tolist() for step in range(5)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 5, 6], [9, 0, 1, 3], [7, 8, 2, 4]]
    assert assign_shards(12, 5, key=3).tolist() == [1, 1, 1, 1, 1, 0, 2, 4, 0, 4, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000, 4097])
def test_permutations(size: int) -> None:
    index = np.arange(size, dtype=np.int64)
    orders = [tuple(permute(index, size, key)) for key in range(3)]
    for order in orders:
        assert sorted(order) == list(range(size))
    assert size < 64 or len(set(orders)) == 3


def test_an_epoch_reads_each_sequence_once() -> None:
    flat = np.concatenate([global_batch_indices(50, 3, 8, step) for step in range(25)])
    assert np.array_equal(flat[:50], np.arange(50))
    for epoch in range(4):
        assert sorted(flat[epoch * 50 : epoch * 50 + 50]) == list(range(50))
    assert not np.array_equal(flat[50:100], flat[100:150])
    assert np.array_equal(global_batch_indices(50, 3, 8, 17), flat[17 * 8 : 18 * 8])
    assert not np.array_equal(global_batch_indices(50, 4, 8, 17), flat[17 * 8 : 18 * 8])


def test_an_empty_dataset_has_no_order() -> None:
    with pytest.raises(ValueError, match="the dataset has no sequences"):
        global_batch_indices(0, 3, 8, 0)
