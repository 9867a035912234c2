"""Guesses at the next tokens, from what the text holds already. No torch, no second model.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): where the last few
tokens stood before, what followed them then may follow now. A guess costs a row of the next
forward; the sampler then chooses at each place as it would have anyway, and what is chosen differs
from the guess ends it. So guesses change no token, only how many forwards they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class PromptLookup:
    """One growing list of tokens, always the same one, and where its n-grams stood last."""

    ngram: int
    _behind: dict[tuple[int, ...], int] = field(default_factory=dict)
    _known: int = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """``count`` tokens that may follow, or none if the last n-gram never stood before."""
        n, total = self.ngram, len(tokens)
        for end in range(max(self._known, n), total):
            self._behind[tuple(tokens[end - n : end])] = end
        self._known = max(total, n)
        at = self._behind.get(tuple(tokens[-n:])) if total >= n else None
        if at is None:
            return []
        # What goes past the end goes round: a text that repeats itself goes on to.
        return [tokens[at + i % (total - at)] for i in range(count)]
