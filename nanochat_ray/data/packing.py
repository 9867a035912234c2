"""Documents packed into sequences of one length by best fit; BOS leads each sequence and chunk.

nanochat crops what does not fit, which drops 35% of its tokens at 2,048 and most of a long
document at 256. Here a document that is longer than a sequence is first split into chunks of its
length, so nothing is cropped; only the last tokens, too few to fill a sequence, are dropped.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class PackedDocuments:
    """Full sequences and how many tokens of the documents (without BOS) they hold."""

    ids: np.ndarray
    """``[n, length]``."""
    num_input_tokens: int
    num_packed_tokens: int


def split_tokens(document: np.ndarray, length: int) -> list[np.ndarray]:
    """Chunks of a document (no BOS) that fit into sequences of ``length`` with their BOS."""
    size = length - 1
    return [document[at : at + size] for at in range(0, len(document), size)]


class _ChunkPool:
    """Chunks that are not packed yet, by length."""

    def __init__(self) -> None:
        self._by_length: dict[int, list[np.ndarray]] = {}
        self._lengths: list[int] = []  # ascending
        self.num_tokens = 0
        """Of all chunks, each with its BOS."""

    def add(self, chunk: np.ndarray) -> None:
        size = len(chunk)
        if size == 0:
            return
        if size not in self._by_length:
            self._by_length[size] = []
            bisect.insort(self._lengths, size)
        self._by_length[size].append(chunk)
        self.num_tokens += size + 1

    def pop_best_fit(self, room: int) -> np.ndarray:
        """The longest chunk of at most ``room`` tokens, or of all chunks where none fits."""
        at = bisect.bisect_right(self._lengths, room) - 1  # -1 is the longest of all
        size = self._lengths[at]
        chunk = self._by_length[size].pop()
        if not self._by_length[size]:
            del self._by_length[size], self._lengths[at]
        self.num_tokens -= size + 1
        return chunk


def pack_documents(
    documents: Iterable[np.ndarray], *, length: int, bos: int, dtype: np.dtype
) -> PackedDocuments:
    """Best-fit sequences of exactly ``length`` ids from documents without BOS; a pure function.

    Each step packs the longest chunk that fits into the rest of the sequence. Where none fits, the
    longest chunk is split at the sequence's end and its rest stays in the pool, so every sequence
    is full. Chunks that do not fill another sequence are dropped.
    """
    pool = _ChunkPool()
    num_input_tokens = 0
    for document in documents:
        num_input_tokens += len(document)
        for chunk in split_tokens(document, length):
            pool.add(chunk)
    sequences: list[np.ndarray] = []
    num_packed_tokens = 0
    while pool.num_tokens >= length:
        sequence = np.empty(length, dtype=dtype)
        at = 0
        while at < length:
            sequence[at] = bos
            at += 1
            if at == length:
                break
            chunk = pool.pop_best_fit(length - at)
            pool.add(chunk[length - at :])
            chunk = chunk[: length - at]
            sequence[at : at + len(chunk)] = chunk
            at += len(chunk)
            num_packed_tokens += len(chunk)
        sequences.append(sequence)
    ids = np.stack(sequences) if sequences else np.empty((0, length), dtype=dtype)
    return PackedDocuments(ids, num_input_tokens, num_packed_tokens)


@dataclass(frozen=True)
class PackedConversations:
    """``ids`` and ``mask`` (uint8), both ``[n, length]``."""

    ids: np.ndarray
    mask: np.ndarray
    num_too_long: int
    """Conversations longer than a sequence, which are left out."""


def pack_conversations(
    conversations: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    length: int,
    bos: int,
    dtype: np.dtype,
) -> PackedConversations:
    """Conversations (ids with BOS, mask) packed by best fit, none of them split.

    Long ones are packed first, since they are hard to fit; those below a quarter of a sequence
    keep their order, so that sequences mix what the caller has mixed: sorting would put like with
    like. The rest of a sequence is padded with BOS under mask 0.
    """
    fitting = [c for c in conversations if len(c[0]) <= length]
    sizes = [len(ids) for ids, _ in fitting]
    order = sorted(range(len(fitting)), key=lambda i: -sizes[i] if 4 * sizes[i] > length else 0)
    rooms: list[tuple[int, int]] = []  # sorted (free tokens, sequence)
    ids: list[np.ndarray] = []
    mask: list[np.ndarray] = []
    for i in order:
        tokens, loss_mask = fitting[i]
        size = len(tokens)
        at = bisect.bisect_left(rooms, (size, -1))
        if at == len(rooms):
            ids.append(np.full(length, bos, dtype=dtype))
            mask.append(np.zeros(length, dtype=np.uint8))
            room, sequence = length, len(ids) - 1
        else:
            room, sequence = rooms.pop(at)
        start = length - room
        ids[sequence][start : start + size] = tokens
        mask[sequence][start : start + size] = loss_mask
        if room > size:
            bisect.insort(rooms, (room - size, sequence))
    shape = (0, length)
    return PackedConversations(
        np.stack(ids) if ids else np.empty(shape, dtype=dtype),
        np.stack(mask) if mask else np.empty(shape, dtype=np.uint8),
        len(conversations) - len(fitting),
    )


class Conversation(NamedTuple):
    """``ids`` with BOS, up to the last trained token, and the ``indices`` of the trained ones."""

    ids: np.ndarray
    indices: np.ndarray


def unpack_conversations(
    ids: np.ndarray, mask: np.ndarray, bos: int, max_len: int
) -> list[Conversation]:
    """The conversations of packed sequences ``ids [n, T + 1]`` with the loss ``mask``, each cut to
    its first ``max_len`` tokens; those without a trained token, such as padding, are left out."""
    conversations = []
    for sequence, sequence_mask in zip(ids, mask, strict=True):
        starts = np.flatnonzero(sequence == bos)
        for part, part_mask in zip(
            np.split(sequence, starts), np.split(sequence_mask, starts), strict=True
        ):
            indices = np.flatnonzero(part_mask[:max_len])
            if len(indices):
                conversations.append(Conversation(part[: indices[-1] + 1], indices))
    return conversations
