"""Scatter and gather: a global shuffle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanochat_ray.data.shuffle import assign_shards, gather, scatter, sequence_dtype
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
    dtype = sequence_dtype(rows.dtype, 7, has_mask=has_mask)
    shards = [gather(root, parts, shard, 5, dtype) for shard in range(3)]
    assert [len(ids) for ids, _ in shards] == pytest.approx([167] * 3, abs=50)
    out = np.concatenate([ids for ids, _ in shards])
    assert out.dtype == np.uint16
    assert np.array_equal(out[np.argsort(out[:, 0])], rows)
    for ids, mask in shards:
        assert (mask is not None) == has_mask
        if mask is not None:
            assert np.array_equal(mask, ids % 3 == 0)
    again = np.concatenate([gather(root, parts, shard, 5, dtype)[0] for shard in range(3)])
    assert np.array_equal(again, out)
    other = np.concatenate([gather(root, parts, shard, 6, dtype)[0] for shard in range(3)])
    assert not np.array_equal(other, out)
    # Hardly any sequence is followed by the one that followed it before.
    assert (np.diff(out[:, 0].astype(int)) == 7).mean() < 0.03


def test_recorded_shuffle(root: Store) -> None:
    """Twelve sequences of two parts: their shards, and the order within these."""
    rows = np.repeat(np.arange(12, dtype=np.uint16)[:, None], 2, axis=1)
    for number, part in enumerate((rows[:7], rows[7:])):
        scatter(root, f"part-{number}", part, None, num_shards=2, key=number)
    dtype = sequence_dtype(rows.dtype, 2, has_mask=False)
    shards = [gather(root, ["part-0", "part-1"], shard, 5, dtype)[0] for shard in range(2)]
    assert [ids[:, 0].tolist() for ids in shards] == [[0, 8, 2, 9, 6, 3], [5, 10, 7, 4, 1, 11]]


def test_a_part_that_ends_too_early_is_named(root: Store) -> None:
    rows = np.arange(20, dtype=np.uint16).reshape(-1, 2)
    scatter(root, "part", rows, None, num_shards=1, key=0)
    root.write_bytes("part", root.read_bytes("part")[:-1])
    with pytest.raises(OSError, match=r"shuffle part part of .* ends too early"):
        gather(root, ["part"], 0, 0, sequence_dtype(rows.dtype, 2, has_mask=False))


def test_a_shard_reads_its_own_bytes_of_a_part(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of shards: one of 1,000 here has about 10 sequences of 16 bytes."""
    rows = np.arange(8 * 10_000, dtype=np.uint16).reshape(-1, 8)
    scatter(root, "part", rows, None, num_shards=1000, key=0)
    assert root.size("part") == 8 * 1001 + rows.nbytes
    reads: list[int] = []

    class File:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> File:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def read_at(self, size: int, at: int) -> Any:
            reads.append(size)
            return self.file.read_at(size, at)

    open_input = Store.open_input
    monkeypatch.setattr(Store, "open_input", lambda self, name: File(open_input(self, name)))
    ids, _ = gather(root, ["part"], 999, 0, sequence_dtype(rows.dtype, 8, has_mask=False))
    assert reads == [16, ids.nbytes]
    assert 0 < len(ids) < 100


def test_shards_are_assigned_evenly() -> None:
    counts = np.bincount(assign_shards(100_000, 7, key=3))
    assert counts.sum() == 100_000
    assert counts == pytest.approx([100_000 / 7] * 7, rel=0.03)
    assert np.array_equal(assign_shards(50, 7, key=3), assign_shards(100, 7, key=3)[:50])
