"""The order of training, recorded: another order is another run."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat_ray.data.order import derive_key, global_batch_indices, mix, permute


def test_recorded_keys() -> None:
    # SplitMix64 (Steele, Lea and Flood, 2014) of a counter.
    assert mix(np.array([0, 1, 2**63], dtype=np.uint64)).tolist() == [
        0,
        6238072747940578789,
        2720858781877447050,
    ]
    assert derive_key(0) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 seeded with 0
    assert derive_key(1) == 10451216379200822465
    assert derive_key(3, 1) == 17027085370592858547
    assert derive_key(1, 3) == 9716232063330790915
    assert derive_key(-1, 2**64) == 6755974106381971767


@pytest.mark.parametrize(
    ("size", "key", "order"),
    [
        (10, 7, [4, 7, 8, 6, 5, 2, 0, 9, 3, 1]),
        (5, 2**63 + 5, [3, 2, 4, 0, 1]),
        (17, 2**64 - 3, [8, 15, 5, 12, 1, 4, 0, 2, 10, 11, 16, 6, 7, 9, 3, 14, 13]),
    ],
)
def test_recorded_permutations(size: int, key: int, order: list[int]) -> None:
    assert permute(np.arange(size), size, key).tolist() == order


def test_recorded_batches() -> None:
    batches = [global_batch_indices(10, 3, 4, step).tolist() for step in range(8)]
    assert batches == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 5, 6],
        [9, 0, 1, 3],
        [7, 8, 2, 4],
        [1, 2, 9, 6],
        [8, 0, 5, 4],
        [7, 3, 2, 4],
    ]


def test_batch_larger_than_the_dataset() -> None:
    # Recorded: three epochs in one batch, each in its own order.
    batch = global_batch_indices(10, 3, 32, 0).tolist()
    assert batch == [*range(10), 5, 6, 9, 0, 1, 3, 7, 8, 2, 4, 1, 2, 9, 6, 8, 0, 5, 4, 7, 3, 2, 4]


def test_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="has no "):
        global_batch_indices(0, 3, 4, 0)
    assert global_batch_indices(1, 3, 4, 5).tolist() == [0] * 4
