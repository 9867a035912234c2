"""The validation split of text: by chunk of a document, decided by its content only.

Equal chunks belong to one split, so no copy of a validation document is trained on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MAX_VAL_SHARE = 0.25
"""Largest share of the text for validation: a chunk whose copies exceed it is trained on."""


def split_document(document: str, max_chars: int) -> list[str]:
    """Chunks of at most ``max_chars`` characters, split after blank lines, lines or words.

    The chunks joined are the document.
    """
    chunks = []
    at = 0
    while len(document) - at > max_chars:
        for separator in ("\n\n", "\n", " ", ""):
            end = document.rfind(separator, at + max_chars // 2, at + max_chars)
            if end >= 0:
                break
        end += len(separator)
        chunks.append(document[at:end])
        at = end
    return [*chunks, document[at:]]


def content_hash(chunk: str) -> int:
    """64 bits; equal for equal chunks, and for chunks that repeat the same lines."""
    lines = chunk.split("\n")
    distinct = set(lines)
    if 2 * len(distinct) <= len(lines):
        chunk = "\n".join(sorted(distinct))
    return int.from_bytes(hashlib.sha256(chunk.encode("utf-8", "replace")).digest()[:8], "big")


@dataclass(frozen=True)
class Census:
    """The chunks of some text: ``hashes`` uint64 ``[n]``, ``sizes`` int64 ``[n]`` (characters)."""

    hashes: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, chunks: Sequence[str], hashes: Sequence[int]) -> Census:
        sizes = np.fromiter(map(len, chunks), np.int64, len(chunks))
        return cls(np.asarray(hashes, dtype=np.uint64), sizes)

    @classmethod
    def concat(cls, censuses: Iterable[Census]) -> Census:
        censuses = list(censuses)
        return cls(
            np.concatenate([np.empty(0, np.uint64), *(census.hashes for census in censuses)]),
            np.concatenate([np.empty(0, np.int64), *(census.sizes for census in censuses)]),
        )

    def sample(self, every: int) -> Census:
        """One in ``every`` different chunks, with all copies of each."""
        mask = self.hashes % np.uint64(every) == 0
        return Census(self.hashes[mask], self.sizes[mask])

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, ascending; characters of all copies of each)."""
        hashes, inverse = np.unique(self.hashes, return_inverse=True)
        return hashes, np.bincount(inverse, self.sizes, len(hashes)).astype(np.int64)

    def duplicates(self) -> tuple[int, float]:
        """(number of chunks that are copies of another one, their share of the characters)."""
        _, first = np.unique(self.hashes, return_index=True)
        total = int(self.sizes.sum())
        return len(self.hashes) - len(first), 1 - int(self.sizes[first].sum()) / max(total, 1)


@dataclass(frozen=True)
class Chunks:
    """The chunks of some documents by split, and the census of both splits."""

    train: list[str]
    val: list[str]
    census: Census


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How the documents of one input are chunked and split; equal for all units of the input."""

    max_chunk_chars: int
    hash_limit: int
    """Chunks whose hashes are below this are for validation,"""
    train_hashes: tuple[int, ...] = ()
    """but for these, whose copies are too much of the text."""
    separates_copies: bool = False
    """Copies of a chunk may be in different splits: the last resort where no text differs."""

    @classmethod
    def for_text(cls, size: int, sequence_len: int) -> SplitRule:
        """For ``size`` bytes of text, packed into sequences of ``sequence_len``.

        Long documents are chunked so that some text can be for validation however few documents
        there are, but a chunk is not much shorter than a sequence (about four characters a token).
        Validation gets about 400 kB, within 0.2 to 5% of the text.
        """
        sequence_chars = 4 * sequence_len
        most = max(64_000, sequence_chars)
        max_chunk_chars = min(max(size // 512, sequence_chars), most, max(size // 16, 200))
        share = min(max(400_000 / size, 0.002), 0.05)
        return cls(max_chunk_chars=max_chunk_chars, hash_limit=int(share * 2**64))

    def split(self, documents: Iterable[str]) -> Chunks:
        """The chunks of one unit's documents."""
        chunks = [
            chunk
            for document in documents
            for chunk in split_document(document, self.max_chunk_chars)
            if chunk.strip()
        ]
        hashes = [content_hash(chunk) for chunk in chunks]
        if self.separates_copies:
            copies: Counter[int] = Counter()
            is_val = []
            for value in hashes:
                is_val.append(content_hash(f"{value}/{copies[value]}") < self.hash_limit)
                copies[value] += 1
        else:
            is_val = [
                value < self.hash_limit and value not in self.train_hashes for value in hashes
            ]
        return Chunks(
            train=[chunk for chunk, val in zip(chunks, is_val, strict=True) if not val],
            val=[chunk for chunk, val in zip(chunks, is_val, strict=True) if val],
            census=Census.of(chunks, hashes),
        )

    def adjust(self, census: Census, min_chars: int) -> SplitRule:
        """This rule if it gives validation at least ``min_chars`` of the text of ``census`` and
        at most ``MAX_VAL_SHARE`` of it, else a rule that does.

        Then chunks are for validation in the order of their hashes, but for those whose copies
        are too much. Where too little text differs for that, copies are split.
        """
        hashes, sizes = census.distinct()
        total = int(sizes.sum())
        max_chars = int(total * MAX_VAL_SHARE)
        min_chars = min(min_chars, total // 6)
        if self.separates_copies or total < 2:
            return self
        is_val = (hashes < self.hash_limit) & ~np.isin(hashes, self.train_hashes)
        if min_chars <= int(sizes[is_val].sum()) <= max_chars:
            return self
        if (rule := self._by_lowest_hashes(hashes, sizes, min_chars, max_chars)) is not None:
            return rule
        # A handful of documents: one of them, though it is much of the text.
        rule = self._by_lowest_hashes(hashes, sizes, 1, total // 2)
        if rule is not None and census.duplicates()[1] < 0.5:
            return rule
        share = min(max(min_chars / total, 0.05), MAX_VAL_SHARE / 2)
        return replace(self, hash_limit=int(share * 2**64), train_hashes=(), separates_copies=True)

    def _by_lowest_hashes(
        self, hashes: np.ndarray, sizes: np.ndarray, min_chars: int, max_chars: int
    ) -> SplitRule | None:
        """Validation gets the lowest ``hashes`` but for those whose ``sizes`` are too much."""
        val_chars, hash_limit, train_hashes = 0, 0, []
        for value, size in zip(hashes.tolist(), sizes.tolist(), strict=True):
            if val_chars >= min_chars:
                break
            if val_chars + size > max_chars:
                train_hashes.append(value)
                continue
            val_chars, hash_limit = val_chars + size, value + 1
        if val_chars < min_chars:
            return None
        return replace(self, hash_limit=hash_limit, train_hashes=tuple(train_hashes))

    def to_json(self) -> dict[str, Any]:
        """JSON values for keys and manifests, under the names that stored ones have."""
        return {
            "longest": self.max_chunk_chars,
            "limit": self.hash_limit,
            "never": list(self.train_hashes),
            "by_copy": self.separates_copies,
        }
