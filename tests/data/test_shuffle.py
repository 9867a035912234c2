"""Scatter and gather: a global shuffle."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat_ray.data.shuffle import assign_shards, gather, scatter
from nanochat_ray.storage import Store


@pytest.mark.parametrize("has_mask", [False, True])
def test_shuffle_is_a_permutation_with_masks(root: Store, has_mask: bool) -> None:
    rows = np.arange(7 * 500, dtype=np.uint16).reshape(-1, 7)
    sizes = [0, 190, 1, 309]
    parts = []
    for number, part in enumerate(np.split(rows, np.cumsum(sizes)[:-1])):
        mask = (part % 3 == 0).astype(np.uint8) if has_mask else None
        scatter(root, f"part-{number}", part, mask, num_shards=3, key=number)
        parts.append(f"part-{number}")
    shards = [gather(root, parts, shard, key=5) for shard in range(3)]
    assert [len(ids) for ids, _ in shards] == pytest.approx([167] * 3, abs=50)
    out = np.concatenate([ids for ids, _ in shards])
    assert out.dtype == np.uint16
    assert np.array_equal(out[np.argsort(out[:, 0])], rows)
    for ids, mask in shards:
        assert (mask is not None) == has_mask
        if mask is not None:
            assert np.array_equal(mask, ids % 3 == 0)
    again = np.concatenate([gather(root, parts, shard, key=5)[0] for shard in range(3)])
    assert np.array_equal(again, out)
    other = np.concatenate([gather(root, parts, shard, key=6)[0] for shard in range(3)])
    assert not np.array_equal(other, out)
    # Hardly any sequence is followed by the one that followed it before.
    assert (np.diff(out[:, 0].astype(int)) == 7).mean() < 0.03


def test_recorded_shuffle(root: Store) -> None:
    """Twelve sequences of two parts: their shards, and the order within these."""
    rows = np.repeat(np.arange(12, dtype=np.uint16)[:, None], 2, axis=1)
    for number, part in enumerate((rows[:7], rows[7:])):
        scatter(root, f"part-{number}", part, None, num_shards=2, key=number)
    shards = [gather(root, ["part-0", "part-1"], shard, key=5)[0] for shard in range(2)]
    assert [ids[:, 0].tolist() for ids in shards] == [[0, 8, 2, 9, 6, 3], [5, 10, 7, 4, 1, 11]]


def test_shards_are_assigned_evenly() -> None:
    counts = np.bincount(assign_shards(100_000, 7, key=3))
    assert counts.sum() == 100_000
    assert counts == pytest.approx([100_000 / 7] * 7, rel=0.03)
    assert np.array_equal(assign_shards(50, 7, key=3), assign_shards(100, 7, key=3)[:50])
