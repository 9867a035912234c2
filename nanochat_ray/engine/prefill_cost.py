"""How many prompt tokens a step takes beside decodes. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TOKENS_PER_DECODE = 3
"""A decode behind 300 tokens lengthens a step by 0.55 ms, a prompt token by 0.15 ms (``classic``,
14 M weights, one core with AMX, 2026-11-21)."""
DOUBLING_WIDTHS = 2
"""``PrefillCostModel.doubling_tokens`` as a multiple of the model's width. A token and layer take
24 width² operations, and 4 width for each earlier token, which would give 6, but attention is less
efficient than matmuls: 1.6 was measured with AMX, 3.6 without (one core, 2026-11-22)."""

SHORT_PROMPT_CHUNKS = 3
"""Length of a prompt, in chunks, up to which one step may take all of it. Over 32 streams with
prompts of 64 to 192 tokens this saves a third of the median time to the first token
(BENCHMARKS.md)."""


@dataclass(frozen=True)
class PrefillCostModel:
    """Prompt tokens in units of a prompt's first token."""

    doubling_tokens: int = 0
    """Earlier tokens at which a prompt token costs twice as much as the first, since it attends to
    all of them; 0: every token costs the same."""
    tokens_per_decode: int = 0
    """Prompt tokens that a step takes for each decode: a step with many decodes is long anyway, so
    that more prompt tokens delay them by the same share."""

    @classmethod
    def of_width(cls, n_embd: int) -> PrefillCostModel:
        return cls(DOUBLING_WIDTHS * n_embd, TOKENS_PER_DECODE)

    def token_cost(self, position: int) -> float:
        """Of the token at this position."""
        return 1 + position / self.doubling_tokens if self.doubling_tokens else 1.0

    def budget(
        self, prefill_chunk: int, prompts: Iterable[tuple[int, int]], num_decodes: int
    ) -> int:
        """Of all prompts in a step with decodes, each given as (tokens to compute, tokens of these
        that are left).

        More prompts get more, so that the time to the first token does not grow with their number.
        A short prompt gets all it needs, so that its first token comes a step or two sooner.
        """
        short = SHORT_PROMPT_CHUNKS * prefill_chunk
        chunks = sum(rest if length <= short else prefill_chunk for length, rest in prompts)
        return max(chunks, self.tokens_per_decode * num_decodes)
