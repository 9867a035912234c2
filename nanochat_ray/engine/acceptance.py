"""What sampled tokens mean for their sequence: accepted, rejected, last, or a tool call."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from nanochat_ray.engine.grammar import GrammarState
from nanochat_ray.engine.request import Finish, RequestOutput, TokenLogprob
from nanochat_ray.engine.sequence import Sequence


@dataclass(slots=True)
class Acceptance:
    """What one step adds to one sequence."""

    tokens: list[int] = field(default_factory=list)
    """Sampled by the model."""
    tool_tokens: list[int] = field(default_factory=list)
    """Injected behind them: the output of a tool."""
    finish: Finish | None = None
    error: str | None = None
    """Why, if ``finish`` is "error"."""
    completes_grammar: bool = False
    """Whether the grammar allows nothing behind the last token."""

    def to_output(
        self, sequence: Sequence, logprobs: SequenceOf[TokenLogprob | None]
    ) -> RequestOutput:
        """``logprobs``: of the tokens that were sampled, the accepted ones first. Tokens of a tool
        have none."""
        output = RequestOutput(
            request_id=sequence.request.id,
            tokens=self.tokens,
            finish=self.finish,
            error=self.error,
            complete=self.completes_grammar,
        )
        count, num_tool_tokens = len(self.tokens), len(self.tool_tokens)
        if num_tool_tokens:
            output.tokens = self.tokens + self.tool_tokens
            output.tool_token_indices = list(range(count, count + num_tool_tokens))
        if sequence.request.params.logprobs is not None:
            output.logprobs = [*logprobs[:count], *[None] * num_tool_tokens]
        return output


def append_token(sequence: Sequence, sampled_ids: SequenceOf[int], vocab_size: int) -> bool:
    """Does what ``accept_tokens`` does where that appends one token and no more, so that most
    tokens take little time. False, and nothing is done, where there may be more to it: the output
    may end, a grammar or a tool goes on, there are draft tokens, or there is no token."""
    token = sampled_ids[0]
    if (
        len(sampled_ids) > 1
        or not 0 <= token < vocab_size
        or token in sequence.stop_token_ids
        or len(sequence.tokens) + 1 >= sequence.max_length
        or sequence.grammar is not None
        or (sequence.tool is not None and sequence.tool.reacts_to(token))
    ):
        return False
    sequence.tokens.append(token)
    return True


def accept_tokens(
    sequence: Sequence, draft: SequenceOf[int], sampled_ids: SequenceOf[int], vocab_size: int
) -> Acceptance:
    """Appends the tokens that were sampled behind a chunk and its draft tokens, up to the first
    that differs from the draft: the logits of those behind it were computed from a wrong token."""
    result = Acceptance(finish="length" if len(sequence.tokens) >= sequence.max_length else None)
    for i, token in enumerate(sampled_ids):
        if result.finish is not None:
            break
        if not 0 <= token < vocab_size:
            result.error, result.finish = _reason_without_token(sequence), "error"
            break
        sequence.tokens.append(token)
        result.tokens.append(token)
        result.finish = sequence.finish_after(token)
        if sequence.grammar is not None and result.finish != "stop":
            _advance_grammar(sequence.grammar, token, result)
        if result.finish is None and sequence.tool is not None:
            _inject_tool_output(sequence, token, result)
        if result.tool_tokens or i == len(draft) or draft[i] != token:
            break
        sequence.num_computed_tokens += 1
    return result


def _advance_grammar(grammar: GrammarState, token: int, result: Acceptance) -> None:
    grammar.feed([token])
    if (error := grammar.error) is not None:
        result.error, result.finish = error, "error"
    elif grammar.is_complete:
        result.completes_grammar, result.finish = True, "stop"


def _inject_tool_output(sequence: Sequence, token: int, result: Acceptance) -> None:
    """If the token ends a tool call, its output is appended and computed as a prompt, together with
    the token, which the in-flight step may have computed as a decode already."""
    assert sequence.tool is not None
    tokens = sequence.tokens
    result.tool_tokens = sequence.tool.feed(token)[: sequence.max_length - len(tokens)]
    if result.tool_tokens:
        first = len(tokens) - 1
        sequence.num_computed_tokens = min(sequence.num_computed_tokens, first)
        sequence.prefill_spans.append((first, len(tokens) + len(result.tool_tokens)))
        tokens += result.tool_tokens
        result.finish = "length" if len(tokens) >= sequence.max_length else None


def _reason_without_token(sequence: Sequence) -> str:
    """Why no token could be sampled for a sequence."""
    if sequence.grammar is not None and sequence.grammar.error is not None:
        return sequence.grammar.error
    return f"logits: they are not finite at position {len(sequence.tokens)}"
