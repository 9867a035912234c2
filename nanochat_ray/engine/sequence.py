"""The state of one request in the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanochat_ray.engine.draft import PromptLookup
from nanochat_ray.engine.request import Finish, Request, TokenLogprob
from nanochat_ray.text.tools import ToolState

if TYPE_CHECKING:
    from nanochat_ray.engine.grammar import GrammarState

PLACEHOLDER = -1
"""Stands for a token id that only the device knows yet."""


@dataclass(eq=False)
class Sequence:
    """The tokens of a request, of which the first ``num_computed_tokens`` have keys and values."""

    request: Request
    tokens: list[int]
    """Prompt and output."""
    seed: int
    max_length: int
    """Length of ``tokens`` at which the output is cut off."""
    tool: ToolState | None = None
    grammar: GrammarState | None = None
    prefill_spans: list[tuple[int, int]] = field(default_factory=list)
    """Tokens ``[start, end)`` that are computed as prompts: the prompt, and the output of tools.
    All others are computed as decodes, also when they are recomputed. Which of the two it is must
    not depend on chunks or preemption, since they differ in the last bit where attention is
    torch's or a GPU's."""
    stop_token_ids: frozenset[int] = frozenset()
    prompt_lookup: PromptLookup | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    """Those of the prompt's tokens from ``prompt_logprobs_start`` on, as far as they are computed;
    None if they were not requested."""
    num_computed_tokens: int = 0
    num_allocated_tokens: int = 0
    """How many of its first tokens have memory in the KV cache, whose manager counts them here."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache had when the sequence was admitted last."""
    num_placeholders: int = 0
    """Tokens behind ``tokens`` that the in-flight step samples: 0 or 1."""
    placeholder_row: int = -1
    """Row of the in-flight step that samples the placeholder."""
    slot: int = -1
    """Index in the running batch; -1 while it waits."""
    arrival: int = 0
    """Order of arrival, which survives preemption."""
    arrival_time: float = 0.0
    """``time.monotonic`` of it."""
    is_finished: bool = False
    prompt_hash: int = field(init=False)
    """Equal for equal prompts."""

    def __post_init__(self) -> None:
        self.prompt_hash = hash(tuple(self.request.prompt))

    @property
    def num_tokens(self) -> int:
        """Placeholders included."""
        return len(self.tokens) + self.num_placeholders

    @property
    def next_scored_position(self) -> int:
        """Index of the next prompt token whose log-probability is missing; the length of the prompt
        if there is none. The logits of the token before it are needed."""
        length = len(self.request.prompt)
        if self.prompt_logprobs is None:
            return length
        return min(length, self.request.params.prompt_logprobs_start + len(self.prompt_logprobs))

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are still missing."""
        return self.next_scored_position < len(self.request.prompt)

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is left to compute, as a decode."""
        start = self.num_computed_tokens
        num_tokens = len(self.tokens) + self.num_placeholders
        return start + 1 == num_tokens and start >= self.prefill_spans[-1][1]

    def next_span(self) -> tuple[int, bool]:
        """End of the next tokens that are all computed as decodes or all as a prompt, and whether
        as decodes."""
        for start, end in self.prefill_spans:
            if self.num_computed_tokens < end:
                return (start, True) if self.num_computed_tokens < start else (end, False)
        return self.num_tokens, True

    def needs_token_at(self, position: int) -> bool:
        """Whether the next token of the sequence is the one at this position."""
        return not self.is_finished and len(self.tokens) + self.num_placeholders == position

    def finish_after(self, token: int) -> Finish | None:
        """Whether the output ends with this token, the last of ``tokens``."""
        if token in self.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.max_length else None

    def propose_draft(self, max_tokens: int) -> tuple[int, ...]:
        """Draft tokens for the next positions, as far as they agree with the grammar."""
        if self.prompt_lookup is None or self.num_placeholders or max_tokens <= 0:
            return ()
        draft = self.prompt_lookup.propose(self.tokens, max_tokens)
        if draft and self.grammar is not None:
            draft = draft[: self.grammar.count_valid(draft)]
        return tuple(draft)
