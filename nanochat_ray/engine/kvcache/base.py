"""What the scheduler needs of a KV cache, whatever its memory layout. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from nanochat_ray.engine.sequence import Sequence


class Span(NamedTuple):
    """Tokens ``[start, start + num_tokens)`` of the sequence in ``slot``, run in one step."""

    slot: int
    start: int
    num_tokens: int
    is_decode: bool
    """Whether each token is computed as if it were alone."""


class KVCacheManager(ABC):
    """Which memory holds the keys and values of which tokens.

    Call order for a sequence that has a slot: ``match_prefix`` once, before its first chunk; then,
    step after step, ``allocate``, the forward, ``commit``; in the end ``free``.

    Invariants:
    - between ``allocate(s, n)`` and ``free(s)`` the tokens ``[0, n)`` of ``s`` have memory of their
      own or share it with an identical prefix, except for tokens behind every attention window;
    - ``allocate`` that returns False changes nothing that another sequence depends on, and it never
      takes memory from another sequence: the caller preempts one and tries again;
    - ``match_prefix`` finds only what was committed with the same ``cache_scope``, and was computed
      as a prompt or by kernels that compute outputs to the same bits, so that the bits of a
      sequence do not depend on earlier requests;
    - ``free`` of a sequence without memory does nothing; committed prefixes stay matchable until
      their memory is allocated again;
    - ``Sequence.num_allocated_tokens``, set by ``allocate`` and ``match_prefix`` and 0 from
      ``free`` on, says for how many tokens ``allocate`` would do nothing;
    - without sequences nothing is referenced (``check_integrity`` with an empty list).
    """

    num_lookup_tokens = num_hit_tokens = 0
    """Prompt tokens that ``match_prefix`` was asked for, and those that it found, in total."""
    caches_prefixes: bool
    """Whether ``match_prefix`` can find anything."""

    @abstractmethod
    def can_admit(self, sequence: Sequence, running: SequenceOf[Sequence]) -> bool:
        """Whether the sequence and its next token fit beside the ``running`` ones, when each of
        those has the memory that its tokens need."""

    @abstractmethod
    def match_prefix(self, sequence: Sequence) -> int:
        """Gives the sequence the longest cached prefix of its prompt; returns its number of
        tokens. The last token is never part of it, since its logits are needed."""

    @abstractmethod
    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Memory for the first ``num_tokens`` tokens of the sequence; False if there is none."""

    @abstractmethod
    def commit(self, sequence: Sequence) -> None:
        """The computed part of the prompt can be matched by other sequences from now on."""

    @abstractmethod
    def free(self, sequence: Sequence) -> None:
        """Releases the memory of a sequence, which still has its slot. Where outputs are computed
        to the same bits as prompts, they are committed first."""

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Drops all cached prefixes, for example when weights change. Sequences keep their memory,
        so they must be preempted first if their prompts are not to be committed later."""

    @abstractmethod
    def frees_memory(self, sequence: Sequence) -> bool:
        """Whether to preempt the sequence would make memory available to others."""

    @abstractmethod
    def usage(self, running: SequenceOf[Sequence]) -> float:
        """Share of the memory that the ``running`` sequences use, from 0 to 1."""

    @abstractmethod
    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        """AssertionError if memory is lost, or referenced by others than ``running``."""


def num_reusable_tokens(sequence: Sequence) -> int:
    """Tokens of the prompt that may come from a cache: those before the first one whose logits are
    needed to score the prompt."""
    if sequence.needs_prompt_logprobs:
        return sequence.next_scored_position - 1
    return len(sequence.request.prompt)


def num_matchable_tokens(sequence: Sequence, with_output: bool = False) -> int:
    """How many tokens ``match_prefix`` may return: those of the prompt but the last token; with the
    output, those of a sequence that was preempted."""
    limit = len(sequence.tokens) - 1
    if with_output and not sequence.needs_prompt_logprobs:
        return limit
    return min(limit, num_reusable_tokens(sequence))


def num_committable_tokens(sequence: Sequence) -> int:
    """Computed tokens of the prompt. Those of the output are computed as decodes, whose bits may
    differ from a prompt's."""
    return min(sequence.num_computed_tokens, len(sequence.request.prompt))
