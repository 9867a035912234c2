"""Which text is held out for validation: by document, and decided by its content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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


def held_out(pieces: Sequence[str], share: float, least: int = 0) -> list[bool]:
    """Whether each piece is for validation: about ``share`` of them, chosen by their hashes.

    Equal pieces go to the same side. If those chosen hold fewer than ``least`` characters, as may
    happen with little text, those with the next hashes are added until they do.
    """
    marks = [_mark(piece) for piece in pieces]
    limit, held = int(share * 2**64), 0
    for mark, piece in sorted(zip(marks, pieces, strict=True)):
        if mark >= limit and held >= least:
            break
        limit = max(limit, mark + 1)
        held += len(piece)
    return [mark < limit for mark in marks]


def _mark(piece: str) -> int:
    return int.from_bytes(hashlib.sha256(piece.encode("utf-8", "replace")).digest()[:8], "big")


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """How the documents of one input are cut and divided; equal for all units of the input."""

    longest: int
    """Characters of a piece, at most."""
    share: float
    least: int
    """Characters that a unit holds out at least."""

    @classmethod
    def of(cls, size: int, units: int, sequence_len: int) -> HoldOut:
        """For ``size`` bytes of text in ``units``, packed into rows of ``sequence_len``.

        Long documents are cut so that some can be held out however few there are, but not much
        shorter than a row (of about four characters a token). About 400 kB are held out, within
        0.2 to 5% of the text; a single unit holds out enough for a few rows.
        """
        row = 4 * sequence_len
        longest = min(max(size // 512, row), max(64_000, row), max(size // 16, 200))
        share = min(max(400_000 / size, 0.002), 0.05)
        return cls(longest=longest, share=share, least=min(4 * row, size // 5) if units == 1 else 0)

    def divide(self, documents: Iterable[str]) -> tuple[list[str], list[str]]:
        """Pieces of one unit's documents: to train on, to validate on."""
        pieces = [piece for text in documents for piece in cut(text, self.longest) if piece.strip()]
        held = held_out(pieces, self.share, self.least)
        train = [piece for piece, out in zip(pieces, held, strict=True) if not out]
        return train, [piece for piece, out in zip(pieces, held, strict=True) if out]
