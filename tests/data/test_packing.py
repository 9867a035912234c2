"""Packing by hand: every token of a split document is in some sequence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nanochat_ray.data.packing import pack_conversations, pack_documents, split_tokens

B = 99
U16 = np.dtype(np.uint16)


def pack(documents: list[list[int]], length: int) -> tuple[list[list[int]], int, int]:
    result = pack_documents(
        [np.array(d, dtype=np.uint16) for d in documents], length=length, bos=B, dtype=U16
    )
    assert result.ids.dtype == U16
    return result.ids.tolist(), result.num_input_tokens, result.num_packed_tokens


@pytest.mark.parametrize(
    ("documents", "length", "sequences", "tokens"),
    [
        # A long document is cut; what is left at the end is less than a sequence.
        ([[1, 2, 3, 4, 5, 6, 7], [8, 9]], 5, [[B, 1, 2, 3, 4], [B, 5, 6, 7, B]], (9, 7)),
        # Nothing fits into the last two places: a document is split, and its rest comes next.
        ([[1, 2, 3], [4, 5, 6], [7, 8]], 6, [[B, 4, 5, 6, B, 1], [B, 2, 3, B, 7, 8]], (8, 8)),
        # The longest one that fits comes first, exactly full ones alone.
        ([[1], [2, 3, 4], [5, 6]], 4, [[B, 2, 3, 4], [B, 5, 6, B]], (6, 5)),
        ([[1, 2, 3], [], [4, 5, 6]], 4, [[B, 1, 2, 3], [B, 4, 5, 6]], (6, 6)),
        # A chunk that fits goes before a longer one that does not.
        ([[1, 2, 3, 4], [5, 6, 7], [8, 9]], 8, [[B, 1, 2, 3, 4, B, 8, 9]], (9, 6)),
        ([[1, 2]], 4, [], (2, 0)),
        ([], 4, [], (0, 0)),
    ],
)
def test_pack_by_hand(
    documents: list[list[int]], length: int, sequences: list[list[int]], tokens: tuple[int, int]
) -> None:
    ids, *counts = pack(documents, length)
    assert sorted(ids) == sorted(sequences)
    assert tuple(counts) == tokens


@pytest.mark.parametrize("length", [3, 8, 33])
def test_lost_tokens_are_the_last_chunks(length: int) -> None:
    """Ids are unique: each is there once, and what is missing is less than one sequence."""
    rng = np.random.default_rng(length)
    bounds = np.cumsum([0, *rng.integers(0, 40, 200)])
    documents = [np.arange(a, b) + 1 for a, b in itertools.pairwise(bounds)]
    result = pack_documents(documents, length=length, bos=0, dtype=np.dtype(np.uint16))
    tokens = result.ids[result.ids > 0]
    assert len(np.unique(tokens)) == len(tokens) == result.num_packed_tokens
    missing = np.setdiff1d(np.arange(bounds[-1]) + 1, tokens)
    assert len(missing) < length - 1
    # Inside a sequence a document's tokens follow each other.
    pairs = np.stack((result.ids[:, :-1].ravel(), result.ids[:, 1:].ravel())).astype(int)
    inside = (pairs > 0).all(axis=0)
    assert (np.diff(pairs[:, inside], axis=0) == 1).all()


def test_chunks_leave_room_for_bos() -> None:
    assert [c.tolist() for c in split_tokens(np.arange(7), 4)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [c.tolist() for c in split_tokens(np.arange(6), 4)] == [[0, 1, 2], [3, 4, 5]]


def test_conversations_by_hand() -> None:
    talks = [
        ([B, 1], [0, 1]),
        ([B, 2, 3, 4, 5], [0, 0, 1, 0, 1]),
        ([B, 6, 7], [0, 1, 1]),
        ([B] * 9, [1] * 9),
        ([B, 8], [0, 1]),
    ]
    result = pack_conversations(talks, length=8, bos=B, dtype=U16)
    # Five and three fill one; the short ones keep their order, and the rest is BOS, not trained.
    assert result.ids.tolist() == [[B, 2, 3, 4, 5, B, 6, 7], [B, 1, B, 8, B, B, B, B]]
    assert result.mask.tolist() == [[0, 0, 1, 0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 0, 0, 0]]
    assert result.num_too_long == 1
    assert (result.ids.dtype, result.mask.dtype) == (U16, np.dtype(np.uint8))


def test_best_fit_takes_the_tightest_gap() -> None:
    # Gaps of 4 and 2 after the long ones: 2 goes to the gap of 2, then 3 to that of 4.
    talks = [([1] * 6, [1] * 6), ([2] * 8, [1] * 8), ([3] * 2, [1] * 2), ([4] * 2, [1] * 2)]
    result = pack_conversations(talks, length=10, bos=0, dtype=U16)
    assert result.ids.tolist() == [[2] * 8 + [3] * 2, [1] * 6 + [4] * 2 + [0] * 2]


def test_no_conversation_gives_no_sequence() -> None:
    result = pack_conversations([([1] * 5, [1] * 5)], length=4, bos=0, dtype=U16)
    assert result.ids.shape == result.mask.shape == (0, 4)
    assert result.num_too_long == 1


def test_order_of_conversations_above_a_quarter() -> None:
    # At length 8, two tokens are a quarter and stay where they are; three are more and go first.
    talks = [([1] * 2, [1] * 2), ([2] * 3, [1] * 3), ([3] * 4, [1] * 4)]
    result = pack_conversations(talks, length=8, bos=0, dtype=U16)
    assert result.ids.tolist() == [[3, 3, 3, 3, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("length", [8, 33, 257])
def test_packing_fills_sequences_and_drops_the_rest(length: int) -> None:
    rng = np.random.default_rng(length)
    sizes = [*rng.integers(0, 60, 300), *rng.integers(500, 3000, 5)]
    # Each token names its document, so that what is packed can be counted.
    documents = [np.full(size, 1000 + number, dtype=np.uint16) for number, size in enumerate(sizes)]
    result = pack_documents(documents, length=length, bos=B, dtype=np.dtype(np.uint16))
    assert result.ids.shape[1] == length
    assert (result.ids[:, 0] == B).all()
    tokens = result.ids[result.ids != B]
    assert result.num_input_tokens == sum(sizes)
    assert result.num_packed_tokens == len(tokens)
    assert result.num_input_tokens - len(tokens) < length
    counts = np.bincount(tokens - 1000, minlength=len(sizes))
    assert (counts <= np.asarray(sizes)).all()
    # Chunks of different documents have a BOS between them.
    inside = result.ids[:, 1:], result.ids[:, :-1]
    changes = (inside[0] != inside[1]) & (inside[0] != B) & (inside[1] != B)
    assert not changes.any()
    again = pack_documents(documents, length=length, bos=B, dtype=np.dtype(np.uint16))
    assert np.array_equal(again.ids, result.ids)


def test_conversations_stay_whole() -> None:
    rng = np.random.default_rng(0)
    conversations = [
        ([B, *[1000 + number] * size], [0, *[1] * size])
        for number, size in enumerate(rng.integers(1, 50, 200))
    ]
    result = pack_conversations(conversations, length=41, bos=B, dtype=np.dtype(np.uint16))
    too_long = [c for c in conversations if len(c[0]) > 41]
    assert result.num_too_long == len(too_long) > 0
    assert result.mask.sum() == sum(len(c[0]) - 1 for c in conversations if len(c[0]) <= 41)
    rows = [",".join(map(str, row)) for row in result.ids]
    for ids, _ in conversations:
        if len(ids) <= 41:
            assert any(",".join(map(str, ids)) in row for row in rows)
    assert (result.ids[result.mask == 1] != B).all()


def test_boundaries_of_long_and_short() -> None:
    # At length 20, 5 is not above a quarter, so it stays behind 4; 20 fits, 21 does not.
    talks = [([n] * n, [1] * n) for n in (4, 5, 20, 21)]
    result = pack_conversations(talks, length=20, bos=0, dtype=U16)
    assert result.ids.tolist() == [[20] * 20, [4] * 4 + [5] * 5 + [0] * 11]
    assert result.num_too_long == 1
