"""Speculative decoding without a second model: draft tokens from n-gram lookup. No torch.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): where the last n tokens
occurred before, what followed them then may follow now. A draft token costs a row of the next
forward. The sampler samples at each position as it would have anyway; the first draft token that
differs is rejected, with those behind it. So drafts change no token, only the number of forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class PromptLookup:
    """The n-grams of one growing list of tokens, and where they occurred last."""

    ngram: int
    _next_position: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Position behind the latest occurrence of an n-gram."""
    _num_indexed: int = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """``count`` tokens that may follow, or none if the last n-gram did not occur before."""
        n, total = self.ngram, len(tokens)
        for end in range(max(self._num_indexed, n), total):
            self._next_position[tuple(tokens[end - n : end])] = end
        self._num_indexed = total
        start = self._next_position.get(tuple(tokens[-n:])) if total >= n else None
        if start is None:
            return []
        # Past the end it wraps around: a text that repeats itself continues to.
        return [tokens[start + i % (total - start)] for i in range(count)]
