"""The validation split: chunks, their hashes, and rules that adjust to the text."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat_ray.data.split import (
    MAX_VAL_SHARE,
    Census,
    SplitRule,
    content_hash,
    split_document,
)

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


def test_hashes_are_the_start_of_sha256() -> None:
    assert content_hash("abc") == 0xBA7816BF8F01CFEA
    # Lines that repeat count once, in any order.
    assert (
        content_hash("b\na\nb\na")
        == content_hash("a\nb\na\nb")
        == content_hash(("a\nb\n" * 9)[:-1])
    )
    assert content_hash("a\nb\nc\na") != content_hash("a\nb\nc")


@pytest.mark.parametrize(
    ("rule", "val"),
    [
        ({"hash_limit": 0xBA7816BF8F01CFEA}, []),
        ({"hash_limit": 0xBA7816BF8F01CFEB}, ["abc"]),
        ({"hash_limit": 2**64, "train_hashes": (0xBA7816BF8F01CFEA,)}, []),
    ],
)
def test_chunks_below_the_limit_validate(rule: dict, val: list[str]) -> None:
    chunks = SplitRule(max_chunk_chars=9, **rule).split(["abc", " \n", "x"])
    assert [chunk for chunk in chunks.val if chunk != "x"] == val
    assert sorted(chunks.train + chunks.val) == ["abc", "x"]


def test_chunks_by_hand() -> None:
    assert split_document("aaaa\n\nbbbb cc\ndd", 8) == ["aaaa\n\n", "bbbb cc\n", "dd"]
    assert split_document("aa bb cc", 6) == ["aa bb ", "cc"]
    assert split_document("aaaaaaa", 3) == ["aaa", "aaa", "a"]
    assert split_document("", 3) == [""]


def test_duplicates_by_hand() -> None:
    census = Census.of(["aa", "bbb", "aa", "aa", "c"], [5, 9, 5, 5, 2])
    assert census.duplicates() == (2, pytest.approx(4 / 10))
    hashes, sizes = census.distinct()
    assert (hashes.tolist(), sizes.tolist()) == ([2, 5, 9], [1, 6, 3])
    assert census.sample(5).hashes.tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("hashes", "sizes", "hash_limit", "train_hashes"),
    [
        # 10 of 100 characters are needed, 25 allowed: the lowest hash alone has 12.
        ([1, 2, 3], [12, 40, 48], 2, ()),
        # The lowest hash is too much of the text; the two after it have 12.
        ([1, 2, 3, 4], [60, 6, 6, 28], 4, (1,)),
        # The first one suffices: none that is too much is named beyond it.
        ([1, 2, 3], [10, 45, 45], 2, ()),
    ],
)
def test_adjusted_rules_by_hand(
    hashes: list[int], sizes: list[int], hash_limit: int, train_hashes: tuple[int, ...]
) -> None:
    census = Census(np.asarray(hashes, np.uint64), np.asarray(sizes, np.int64))
    rule = SplitRule(max_chunk_chars=99, hash_limit=0).adjust(census, 10)
    assert (rule.hash_limit, rule.train_hashes) == (hash_limit, train_hashes)
    assert not rule.separates_copies
    assert rule.adjust(census, 10) is rule


def test_stored_rules_keep_their_names() -> None:
    rule = SplitRule(max_chunk_chars=9, hash_limit=8, train_hashes=(7,), separates_copies=True)
    assert rule.to_json() == {"longest": 9, "limit": 8, "never": [7], "by_copy": True}
