"""Scatter and gather, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat_ray.data.holdout import HoldOut, cut, held_out
from nanochat_ray.data.shuffle import draw, gather, scatter
from nanochat_ray.storage import Store


@pytest.mark.parametrize("masked", [False, True])
def test_every_row_comes_out_once_with_its_mask(root: Store, masked: bool) -> None:
    rows = np.arange(7 * 500, dtype=np.uint16).reshape(-1, 7)
    sizes = [0, 190, 1, 309]
    parts = []
    for number, part in enumerate(np.split(rows, np.cumsum(sizes)[:-1])):
        mask = (part % 3 == 0).astype(np.uint8) if masked else None
        scatter(root, f"part-{number}", part, mask, shards=3, key=number)
        parts.append(f"part-{number}")
    gathered = [gather(root, parts, shard, key=5) for shard in range(3)]
    assert [len(ids) for ids, _ in gathered] == pytest.approx([167] * 3, abs=50)
    out = np.concatenate([ids for ids, _ in gathered])
    assert out.dtype == np.uint16
    assert np.array_equal(out[np.argsort(out[:, 0])], rows)
    for ids, mask in gathered:
        assert (mask is not None) == masked
        if mask is not None:
            assert np.array_equal(mask, ids % 3 == 0)
    again = np.concatenate([gather(root, parts, shard, key=5)[0] for shard in range(3)])
    assert np.array_equal(again, out)
    other = np.concatenate([gather(root, parts, shard, key=6)[0] for shard in range(3)])
    assert not np.array_equal(other, out)
    # Shuffled indeed: hardly any row is followed by the one that followed it before.
    assert (np.diff(out[:, 0].astype(int)) == 7).mean() < 0.03


def test_rows_are_drawn_evenly() -> None:
    counts = np.bincount(draw(100_000, 7, key=3))
    assert counts.sum() == 100_000
    assert counts == pytest.approx([100_000 / 7] * 7, rel=0.03)
    assert np.array_equal(draw(50, 7, key=3), draw(100, 7, key=3)[:50])


def test_holding_out_depends_on_the_text_alone() -> None:
    pieces = [f"document {i}" for i in range(5000)]
    held = held_out(pieces, 0.05)
    assert np.mean(held) == pytest.approx(0.05, abs=0.01)
    assert held_out(pieces[::-1], 0.05)[::-1] == held
    assert held_out(pieces[:10], 0.0) == [False] * 10
    twice = held_out([*pieces, *pieces], 0.05)
    assert twice == [*held, *held]


@pytest.mark.parametrize("count", [2, 5, 40])
def test_a_little_text_is_held_out_however_few_documents(count: int) -> None:
    pieces = [f"{i}" * 100 for i in range(count)]
    held = held_out(pieces, 0.001, least=150)
    assert 150 <= sum(len(p) for p, out in zip(pieces, held, strict=True) if out) <= 500


@pytest.mark.parametrize("size", [20_000, 1_000_000])
@pytest.mark.parametrize("sequence_len", [256, 2048])
def test_one_book_is_divided(size: int, sequence_len: int) -> None:
    text = "".join(f"{i:06d} is a number.\n" for i in range(size // 20))
    rule = HoldOut.of(len(text), 1, sequence_len)
    train, val = rule.divide([text])
    assert sorted([*train, *val]) == sorted(cut(text, rule.longest))
    held = sum(map(len, val))
    assert min(16 * sequence_len, len(text) // 5) <= held <= len(text) // 2


def test_little_of_much_text_is_held_out() -> None:
    assert HoldOut.of(25_000_000, 6, 512).share == pytest.approx(0.016)
    assert HoldOut.of(10**12, 4000, 2048) == HoldOut(longest=64_000, share=0.002, least=0)
