"""Chunks of a step that compute the same: of the samples of one prompt, many have the same tokens.

Where a token's keys, values and logits are a function of the tokens up to it alone, bit by bit
(attention in C), one of them is computed, and the others get copies. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanochat_ray.engine.scheduler import ScheduledChunk


def find_sources(chunks: Sequence[ScheduledChunk]) -> list[int] | None:
    """For each chunk the index of the first one that computes the same tokens behind the same
    tokens, its own if there is none; None if all differ."""
    distinct: dict[tuple[int, ...], list[int]] = {}
    sources = []
    for i, c in enumerate(chunks):
        s, source = c.sequence, i
        if not c.draft and c.input_from_previous_step is None:
            end = c.start + c.num_tokens
            key = (s.prompt_hash, c.start, end, c.num_logits, s.tokens[end - 1])
            candidates = distinct.setdefault(key, [])
            for candidate in candidates:
                if _are_equal(chunks[candidate].sequence.tokens, s.tokens, end):
                    source = candidate
                    break
            else:
                candidates.append(i)
        sources.append(source)
    return sources if sources != list(range(len(chunks))) else None


def _are_equal(tokens: list[int], others: list[int], end: int) -> bool:
    """Whether the first ``end`` are; a decode's are all of them, which need no copies."""
    if len(tokens) == len(others) == end:
        return tokens == others
    return tokens[:end] == others[:end]
