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


@pytest.mark.slow
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
    assert split_document("aaaa", 4) == ["aaaa"]
    assert split_document("aaaaa", 4) == ["aaaa", "a"]
    assert split_document("", 3) == [""]
    # A separator counts from half a chunk on.
    assert split_document("aaa bbbbbbb", 6) == ["aaa ", "bbbbbb", "b"]
    assert split_document("aa bbbbbbbb", 6) == ["aa bbb", "bbbbb"]
    # The last of them, and blank lines before lines before words.
    assert split_document("a\n\nb\nc d e", 6) == ["a\n\nb\n", "c d e"]


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
        # Exactly a quarter.
        ([1, 2], [25, 75], 2, ()),
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


@pytest.mark.parametrize(
    ("size", "sequence_len", "max_chunk_chars", "share"),
    [
        # 400 kB are less than 0.2%: the share is at its lower bound; a chunk is 1 / 512.
        (1_000_000_000, 512, 64_000, 0.002),
        (25_600_000, 512, 50_000, 400_000 / 25_600_000),
        (1_000_000, 2048, 4 * 2048, 0.05),  # a sequence of four characters a token
        (1_000_000_000, 32_768, 4 * 32_768, 0.002),  # of which one may exceed 64,000
        (16_000, 512, 1000, 0.05),  # a sixteenth
        (1000, 512, 200, 0.05),
    ],
)
def test_rules_for_text_by_hand(
    size: int, sequence_len: int, max_chunk_chars: int, share: float
) -> None:
    rule = SplitRule.for_text(size, sequence_len)
    assert rule == SplitRule(max_chunk_chars=max_chunk_chars, hash_limit=int(share * 2**64))


def test_copies_are_numbered_in_order() -> None:
    """The nth copy of a chunk is for validation if the hash of "hash/n" is below the limit."""
    value = content_hash("abc")
    hashes = [content_hash(f"{value}/{n}") for n in range(6)]
    limit = sorted(hashes)[2]
    rule = SplitRule(max_chunk_chars=9, hash_limit=limit, separates_copies=True)
    chunks = rule.split(["abc"] * 6)
    assert len(chunks.val) == 2
    for count in range(7):
        expected_count = sum(each < limit for each in hashes[:count])
        assert len(rule.split(["abc"] * count).val) == expected_count


def test_hashes_that_train_do_not_validate() -> None:
    """They are below the limit, but their copies are too much of the text."""
    a, b = sorted(["abc", "x"], key=content_hash)
    rule = SplitRule(max_chunk_chars=9, hash_limit=2**64, train_hashes=(content_hash(a),))
    assert (rule.split([a, b, a]).train, rule.split([a, b, a]).val) == ([a, a], [b])


def census_of(sizes: dict[int, list[int]]) -> Census:
    """Of chunks by hash: the sizes of its copies."""
    pairs = [(value, size) for value, each in sizes.items() for size in each]
    hashes, lengths = zip(*pairs, strict=True) if pairs else ((), ())
    return Census(np.asarray(hashes, np.uint64), np.asarray(lengths, np.int64))


@pytest.mark.parametrize(
    ("sizes", "min_chars", "hash_limit", "by_copy"),
    [
        # Half of 100 would be for validation, at most a quarter may be: the limit is lower.
        ({1: [25], 9: [25], 12: [50]}, 10, 2, False),
        # Exactly a quarter, and exactly as much as is needed.
        ({1: [25], 12: [75]}, 25, 10, False),
        ({1: [24], 12: [72]}, 24, 10, False),
        # At most a sixth is needed, whatever is asked for.
        ({1: [16], 12: [84]}, 99, 10, False),
        # One of two documents, though it is half of the text; half of it are copies.
        ({1: [10], 12: [10]}, 9, 2, False),
        ({1: [10, 10], 12: [10, 10]}, 9, int(0.125 * 2**64), True),
        ({1: [11], 12: [10]}, 9, 13, False),  # less than half is found behind it
        # Only one text: its copies are split, 5 to 12.5% of them.
        ({11: [10] * 10}, 2, int(0.05 * 2**64), True),
        ({11: [10] * 10}, 10, int(0.1 * 2**64), True),
        ({11: [10] * 10}, 14, int(0.125 * 2**64), True),
        ({11: [1]}, 1, 10, False),  # one character is for training
        ({}, 1, 10, False),
        ({11: [5]}, 1, 10, False),  # of less than 6 characters none are needed,
        ({1: [5]}, 1, 0, False),  # and more than a quarter is too much
        ({11: [6]}, 1, int(0.125 * 2**64), True),
    ],
)
def test_adjusted_limits_by_hand(
    sizes: dict[int, list[int]], min_chars: int, hash_limit: int, by_copy: bool
) -> None:
    rule = SplitRule(max_chunk_chars=99, hash_limit=10).adjust(census_of(sizes), min_chars)
    assert (rule.hash_limit, rule.separates_copies) == (hash_limit, by_copy)
    assert rule.max_chunk_chars == 99


def test_split_copies_stay_split() -> None:
    rule = SplitRule(max_chunk_chars=9, hash_limit=8, separates_copies=True)
    assert rule.adjust(census_of({1: [10], 12: [90]}), 10) is rule


def test_censuses_by_hand() -> None:
    one, two = census_of({5: [2, 2]}), census_of({9: [3]})
    both = Census.concat(iter([one, two]))
    assert (both.hashes.tolist(), both.sizes.tolist()) == ([5, 5, 9], [2, 2, 3])
    assert Census.concat([]).duplicates() == (0, 1.0)
    assert both.sample(9).sizes.tolist() == [3]


def test_stored_rules_keep_their_names() -> None:
    rule = SplitRule(max_chunk_chars=9, hash_limit=8, train_hashes=(7,), separates_copies=True)
    assert rule.to_json() == {"longest": 9, "limit": 8, "never": [7], "by_copy": True}
