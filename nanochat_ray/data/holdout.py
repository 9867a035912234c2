"""Which text is held out for validation: by document, and decided by its content alone.

Equal documents go to the same split, so no copy of a validation document is trained on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

MAX_SHARE = 0.25
"""Of the text, at most, for validation: a document with more copies than that is trained on."""


def cut(document: str, longest: int) -> list[str]:
    """A document in pieces of at most ``longest`` characters, cut after blank lines or lines.

    Nothing is lost: the pieces joined are the document.
    """
    made = []
    at = 0
    while len(document) - at > longest:
        for mark in ("\n\n", "\n", " ", ""):
            end = document.rfind(mark, at + longest // 2, at + longest)
            if end >= 0:
                break
        end += len(mark)
        made.append(document[at:end])
        at = end
    return [*made, document[at:]]


def content_hash(piece: str) -> int:
    """64 bits; equal for equal pieces, and for those that repeat the same lines."""
    lines = piece.split("\n")
    distinct = set(lines)
    if 2 * len(distinct) <= len(lines):
        piece = "\n".join(sorted(distinct))
    return int.from_bytes(hashlib.sha256(piece.encode("utf-8", "replace")).digest()[:8], "big")


@dataclass(frozen=True)
class Census:
    """The pieces of some text: ``hashes`` uint64 ``[n]``, ``sizes`` int64 ``[n]`` (characters)."""

    hashes: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, pieces: Sequence[str], hashes: Sequence[int]) -> Census:
        sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        return cls(np.asarray(hashes, dtype=np.uint64), sizes)

    @classmethod
    def join(cls, parts: Sequence[Census]) -> Census:
        return cls(
            np.concatenate([np.empty(0, np.uint64), *(part.hashes for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *(part.sizes for part in parts)]),
        )

    def thinned(self, every: int) -> Census:
        """A share of 1 in ``every`` different pieces, with all their copies."""
        chosen = self.hashes % np.uint64(every) == 0
        return Census(self.hashes[chosen], self.sizes[chosen])

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, ascending; characters of all copies of each)."""
        hashes, inverse = np.unique(self.hashes, return_inverse=True)
        return hashes, np.bincount(inverse, self.sizes, len(hashes)).astype(np.int64)

    def duplicates(self) -> tuple[int, float]:
        """How many pieces are copies of another one, and their share of the text."""
        _, first = np.unique(self.hashes, return_index=True)
        total = int(self.sizes.sum())
        return len(self.hashes) - len(first), 1 - int(self.sizes[first].sum()) / max(total, 1)


@dataclass(frozen=True)
class Divided:
    """Pieces of documents: to train on, to validate on; and the census of both."""

    train: list[str]
    val: list[str]
    census: Census


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """How the documents of one input are cut and divided; equal for all units of the input."""

    longest: int
    """Characters of a piece, at most."""
    limit: int
    """Pieces whose hashes are below this are held out,"""
    never: tuple[int, ...] = ()
    """but for these, which would be too much."""
    by_copy: bool = False
    """Copies of a piece are divided among the splits: all that is left where no text differs."""

    @classmethod
    def of(cls, size: int, sequence_len: int) -> HoldOut:
        """For ``size`` bytes of text, packed into rows of ``sequence_len``.

        Long documents are cut so that some can be held out however few there are, but not much
        shorter than a row (of about four characters a token). About 400 kB are held out, within
        0.2 to 5% of the text.
        """
        row = 4 * sequence_len
        longest = min(max(size // 512, row), max(64_000, row), max(size // 16, 200))
        share = min(max(400_000 / size, 0.002), 0.05)
        return cls(longest=longest, limit=int(share * 2**64))

    def divide(self, documents: Iterable[str]) -> Divided:
        """The pieces of one unit's documents."""
        pieces = [piece for text in documents for piece in cut(text, self.longest) if piece.strip()]
        hashes = [content_hash(piece) for piece in pieces]
        if self.by_copy:
            copies: Counter[int] = Counter()
            marks = []
            for value in hashes:
                marks.append(content_hash(f"{value}/{copies[value]}"))
                copies[value] += 1
            out = [mark < self.limit for mark in marks]
        else:
            out = [value < self.limit and value not in self.never for value in hashes]
        return Divided(
            train=[piece for piece, held in zip(pieces, out, strict=True) if not held],
            val=[piece for piece, held in zip(pieces, out, strict=True) if held],
            census=Census.of(pieces, hashes),
        )

    def settled(self, census: Census, least: int) -> HoldOut:
        """This one if it holds out at least ``least`` characters of what ``census`` counted and at
        most ``MAX_SHARE``, else one that does.

        Pieces are then held out in the order of their hashes, but for those with so many copies
        that they are too much. Where too little text differs for that, copies are divided.
        """
        hashes, sizes = census.distinct()
        total = int(sizes.sum())
        most = int(total * MAX_SHARE)
        least = min(least, total // 6)
        if self.by_copy or total < 2:
            return self
        held = int(sizes[(hashes < self.limit) & ~np.isin(hashes, self.never)].sum())
        if least <= held <= most:
            return self
        if (chosen := self._lowest(hashes, sizes, least, most)) is not None:
            return chosen
        # A handful of documents: one of them, though it is much of the text.
        chosen = self._lowest(hashes, sizes, 1, total // 2)
        if chosen is not None and census.duplicates()[1] < 0.5:
            return chosen
        share = min(max(least / total, 0.05), MAX_SHARE / 2)
        return replace(self, limit=int(share * 2**64), never=(), by_copy=True)

    def _lowest(
        self, hashes: np.ndarray, sizes: np.ndarray, least: int, most: int
    ) -> HoldOut | None:
        """Holds out the lowest ``hashes`` but for those whose ``sizes`` are too much."""
        held, limit, never = 0, 0, []
        for value, size in zip(hashes.tolist(), sizes.tolist(), strict=True):
            if held >= least:
                break
            if held + size > most:
                never.append(value)
                continue
            held, limit = held + size, value + 1
        if held < least:
            return None
        return replace(self, limit=limit, never=tuple(v for v in never if v < limit))
