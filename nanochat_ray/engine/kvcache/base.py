"""What the scheduler needs of a KV cache, whatever its memory layout. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Tokens ``[start, start + num_tokens)`` of the sequence in ``slot``, run in one step."""

    slot: int
    start: int
    num_tokens: int
    is_decode: bool
    """Whether each token is computed as if it were alone."""
