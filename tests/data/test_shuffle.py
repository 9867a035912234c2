"""Scatter and gather, and the validation split."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat_ray.data.shuffle import assign_shards, gather, scatter
from nanochat_ray.data.split import MAX_VAL_SHARE, SplitRule, split_document
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


def test_shards_are_assigned_evenly() -> None:
    counts = np.bincount(assign_shards(100_000, 7, key=3))
    assert counts.sum() == 100_000
    assert counts == pytest.approx([100_000 / 7] * 7, rel=0.03)
    assert np.array_equal(assign_shards(50, 7, key=3), assign_shards(100, 7, key=3)[:50])


RULE = SplitRule(max_chunk_chars=1000, hash_limit=int(0.05 * 2**64))


def adjust(rule: SplitRule, documents: list[str], least: int) -> SplitRule:
    return rule.adjust(rule.split(documents).census, least)


def test_split_depends_on_the_text_alone() -> None:
    chunks = [f"document {i}" for i in range(5000)]
    split = RULE.split(chunks)
    assert len(split.val) / 5000 == pytest.approx(0.05, abs=0.01)
    assert sorted(RULE.split(chunks[::-1]).val) == sorted(split.val)
    assert RULE.split([*chunks, *chunks]).val == [*split.val, *split.val]
    assert adjust(RULE, chunks, 100) is RULE


@pytest.mark.parametrize("count", [2, 3, 5, 40])
def test_few_documents_have_a_validation_split(count: int) -> None:
    chunks = [f"{i:03d}" * 100 for i in range(count)]
    rule = adjust(SplitRule(max_chunk_chars=1000, hash_limit=0), chunks, 150)
    split = rule.split(chunks)
    assert len(split.val) == 1
    assert not rule.separates_copies


def test_copies_stay_in_one_split() -> None:
    """However often a document occurs, its copies are together, and validation is small."""
    rng = np.random.default_rng(0)
    documents = [f"document {i} " * 9 for i in range(200)]
    copies = [documents[i] for i in rng.zipf(1.3, 20_000) % 200]
    for corpus in (documents, documents * 7, copies, ["boilerplate " * 20] * 5000 + documents):
        rule = adjust(SplitRule(max_chunk_chars=1000, hash_limit=2**57), corpus, 4000)
        split = rule.split(corpus)
        assert not set(split.train) & set(split.val)
        val_share = sum(map(len, split.val)) / sum(map(len, corpus))
        assert 0 < val_share <= MAX_VAL_SHARE
        again = split.census.concat([split.census])
        assert rule.adjust(again, 4000) == rule
    assert RULE.split(documents * 7).census.duplicates() == (1200, pytest.approx(6 / 7))


@pytest.mark.parametrize("size", [1_000, 300_000])
def test_equal_lines_still_train(size: int) -> None:
    """Once it was 2 sequences to train on and 1,563 to validate."""
    text = "the same line again\n" * size
    for documents in ([text], text.splitlines(), [text] * 3):
        rule = SplitRule.for_text(len(text), 64)
        rule = adjust(rule, documents, 16 * 64)
        split = rule.split(documents)
        val_share = sum(map(len, split.val)) / sum(map(len, split.train + split.val))
        assert rule.separates_copies
        assert 0.01 < val_share < 0.3


@pytest.mark.parametrize("size", [20_000, 1_000_000])
@pytest.mark.parametrize("sequence_len", [256, 2048])
def test_one_book_has_both_splits(size: int, sequence_len: int) -> None:
    text = "".join(f"{i:06d} is a number.\n" for i in range(size // 20))
    rule = adjust(SplitRule.for_text(len(text), sequence_len), [text], 16 * sequence_len)
    split = rule.split([text])
    assert sorted([*split.train, *split.val]) == sorted(split_document(text, rule.max_chunk_chars))
    val_chars = sum(map(len, split.val))
    assert min(16 * sequence_len, len(text) // 6) <= val_chars <= len(text) // 2


def test_large_text_has_a_small_validation_split() -> None:
    assert SplitRule.for_text(25_000_000, 512).hash_limit / 2**64 == pytest.approx(0.016)
    huge = SplitRule.for_text(10**12, 2048)
    assert (huge.max_chunk_chars, huge.hash_limit / 2**64) == (64_000, pytest.approx(0.002))


def test_a_sampled_census_counts_as_the_whole() -> None:
    documents = [f"document {i % 4000}" for i in range(12_000)]
    census = RULE.split(documents).census
    copies, share = census.duplicates()
    assert copies == 8000
    few, share_of_few = census.sample(8).duplicates()
    assert 8 * few == pytest.approx(copies, rel=0.2)
    assert share_of_few == pytest.approx(share, rel=0.02)
