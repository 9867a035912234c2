"""What sampled tokens mean for their sequence, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_ray.engine.acceptance import Acceptance, accept_tokens, append_token
from nanochat_ray.engine.draft import PromptLookup
from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.engine.request import Request, SamplingParams, TokenLogprob
from nanochat_ray.engine.sequence import Sequence
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tools import Tool, ToolState

PROMPT = [1, 2, 3]
TOK = Tokenizer.bytes_only()


def sequence(answer: list[int] | None = None, **fields: Any) -> Sequence:
    """All tokens but the last are computed, as after a step."""
    tokens = [*PROMPT, *(answer or [9])]
    request = Request(id="a", prompt=PROMPT, params=SamplingParams())
    values = {"max_length": 99, "num_computed_tokens": len(tokens), "seed": 0} | fields
    return Sequence(request, tokens, prefill_spans=[(0, 3)], **values)


def accept(s: Sequence, draft: list[int], sampled_ids: list[int]) -> Acceptance:
    return accept_tokens(s, draft, sampled_ids, vocab_size=50)


@pytest.mark.parametrize(
    ("draft", "sampled_ids", "tokens"),
    [
        ([], [5], [5]),
        ([], [0], [0]),
        ([], [49], [49]),
        ([4, 5], [4, 5, 6], [4, 5, 6]),
        ([4, 5], [4, 7, 6], [4, 7]),  # what comes behind 7 was computed from 5
        ([4, 5], [7, 5, 6], [7]),
    ],
)
def test_tokens_up_to_the_first_rejected_one(
    draft: list[int], sampled_ids: list[int], tokens: list[int]
) -> None:
    s = sequence()
    assert accept(s, draft, sampled_ids) == Acceptance(tokens=tokens)
    assert s.tokens == [*PROMPT, 9, *tokens]
    # The last token is not computed; the accepted draft tokens are.
    assert s.num_computed_tokens == 4 + len(tokens) - 1


@pytest.mark.parametrize(
    ("sampled_ids", "fields", "is_appended"),
    [
        *(([5], {}, True), ([0], {}, True), ([49], {}, True)),
        *(([-1], {}, False), ([50], {}, False), ([5, 6], {}, False)),
        ([5], {"stop_token_ids": (6,)}, True),
        ([5], {"stop_token_ids": (6, 5)}, False),
        ([5], {"max_length": 6}, True),
        ([5], {"max_length": 5}, False),  # it would be the last
        ([5], {"grammar": object()}, False),
        ([5], {"tool": SimpleNamespace(reacts_to=lambda token: token == 6)}, True),
        ([5], {"tool": SimpleNamespace(reacts_to=lambda token: token == 5)}, False),
    ],
)
def test_a_plain_token_is_appended(
    sampled_ids: list[int], fields: dict[str, Any], is_appended: bool
) -> None:
    s = sequence(**fields)
    assert append_token(s, sampled_ids, vocab_size=50) is is_appended
    assert s.tokens == [*PROMPT, 9, *(sampled_ids if is_appended else [])]


@pytest.mark.parametrize("token", [-1, 50])
def test_an_invalid_token_is_an_error(token: int) -> None:
    s = sequence()
    assert accept(s, [4], [4, token]) == Acceptance(
        tokens=[4], finish="error", error="logits: they are not finite at position 5"
    )
    assert s.tokens == [*PROMPT, 9, 4]


@pytest.mark.parametrize(
    ("fields", "tokens", "finish"),
    [
        ({"max_length": 6}, [4, 5], "length"),
        ({"max_length": 5}, [4], "length"),
        ({"max_length": 4}, [], "length"),  # only the prompt's log-probabilities were requested
        ({"max_length": 7}, [4, 5, 6], "length"),
        ({"stop_token_ids": frozenset([5])}, [4, 5], "stop"),
        ({"stop_token_ids": frozenset([4]), "max_length": 5}, [4], "stop"),
    ],
)
def test_nothing_follows_the_end(fields: dict[str, Any], tokens: list[int], finish: str) -> None:
    s = sequence(**fields)
    assert accept(s, [4, 5], [4, 5, 6]) == Acceptance(tokens=tokens, finish=finish)  # type: ignore[arg-type]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_output_by_hand(logprobs: int | None) -> None:
    """Tokens of a tool come behind the sampled ones, and have no log-probabilities."""
    request = Request(id="a", prompt=PROMPT, params=SamplingParams(logprobs=logprobs))
    s = Sequence(request, [*PROMPT, 4, 5, 22, 23], seed=0, max_length=99)
    one, two, three = (TokenLogprob(logprob=-float(i), top=[]) for i in (1, 2, 3))
    acceptance = Acceptance(tokens=[4, 5], tool_tokens=[22, 23], finish="length")
    output = acceptance.to_output(s, [one, two, three])
    assert (output.tokens, output.tool_token_indices) == ([4, 5, 22, 23], [2, 3])
    assert (output.request_id, output.finish, output.error) == ("a", "length", None)
    assert output.logprobs == (None if logprobs is None else [one, two, None, None])
    output = Acceptance([4], [], "stop", None, completes_grammar=True).to_output(s, [one, two])
    assert (output.tokens, output.tool_token_indices, output.complete) == ([4], [], True)
    assert output.logprobs == (None if logprobs is None else [one])


def calculator() -> ToolState:
    """Between 20 and 21; the result is the input, between 22 and 23."""
    return ToolState(Tool(20, 21, 22, 23, lambda ids: ids))


@pytest.mark.parametrize("num_computed_tokens", [5, 6])
def test_a_tools_output_is_computed_as_a_prompt(num_computed_tokens: int) -> None:
    s = sequence([20, 8], tool=calculator(), num_computed_tokens=num_computed_tokens)
    assert s.tool is not None
    for token in s.tokens[3:]:
        s.tool.feed(token)
    assert accept(s, [21, 4], [21, 4, 5]) == Acceptance(tokens=[21], tool_tokens=[22, 8, 23])
    assert s.tokens == [*PROMPT, 20, 8, 21, 22, 8, 23]
    # From the token that ends the call on, though the in-flight step has computed it as a decode.
    assert s.prefill_spans == [(0, 3), (5, 9)]
    assert s.num_computed_tokens == 5
    assert s.next_span() == (9, False)


@pytest.mark.parametrize(("max_length", "tool_tokens"), [(9, [22, 8, 23]), (8, [22, 8]), (7, [22])])
def test_a_tools_output_ends_at_the_limit(max_length: int, tool_tokens: list[int]) -> None:
    s = sequence([20, 8], tool=calculator(), max_length=max_length)
    assert s.tool is not None
    for token in s.tokens[3:]:
        s.tool.feed(token)
    result = accept(s, [], [21])
    assert (result.tokens, result.tool_tokens, result.finish) == ([21], tool_tokens, "length")


def test_a_last_token_calls_no_tool() -> None:
    s = sequence([20, 8], tool=calculator(), stop_token_ids=frozenset([21]))
    assert s.tool is not None
    for token in s.tokens[3:]:
        s.tool.feed(token)
    assert accept(s, [], [21]) == Acceptance(tokens=[21], finish="stop")


def test_a_grammar_ends_its_answer() -> None:
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    a, b, c = TOK.encode("abc")

    def accept_text(token: int, regex: str = "ab", **fields: Any) -> Acceptance:
        state = grammars.start({"regex": regex}, [TOK.bos], [a], 40)
        s = sequence([a], grammar=state, stop_token_ids=frozenset([TOK.bos]), **fields)
        return accept_tokens(s, [], [token], TOK.vocab_size)

    assert accept_text(b) == Acceptance(tokens=[b], finish="stop", completes_grammar=True)
    # Where it may end, a stop token does, which is not part of it.
    assert accept_text(TOK.bos, "ab*") == Acceptance(tokens=[TOK.bos], finish="stop")
    assert accept_text(b, "ab*") == Acceptance(tokens=[b])
    # At the limit too: nothing is cut off.
    assert accept_text(b, max_length=5).completes_grammar
    result = accept_text(c)
    assert (result.tokens, result.finish) == ([c], "error")
    assert result.error
    result = accept_text(-1)
    assert (result.tokens, result.finish) == ([], "error")


def test_spans_are_prompts_or_decodes() -> None:
    s = sequence([9, 8, 7, 6])
    s.prefill_spans = [(0, 3), (5, 6)]
    spans = []
    for s.num_computed_tokens in range(8):
        spans.append(s.next_span())
    assert spans == [(3, False)] * 3 + [(5, True)] * 2 + [(6, False)] + [(7, True)] * 2
    assert [s.is_decoding for s.num_computed_tokens in range(8)] == [False] * 6 + [True, False]
    s.num_placeholders = 1
    assert (s.num_tokens, s.next_span()) == (8, (8, True))
    assert [s.is_decoding for s.num_computed_tokens in (6, 7)] == [False, True]


def test_missing_prompt_logprobs() -> None:
    s = sequence()
    one = TokenLogprob(logprob=-1.0, top=[])
    results = []
    for s.prompt_logprobs in (None, [], [one], [one] * 2):
        results.append(s.needs_prompt_logprobs)
    assert results == [False, True, True, False]  # the first of three has none


def test_the_next_token_is_at_one_position() -> None:
    s = sequence([9])
    assert [s.needs_token_at(position) for position in (3, 4, 5)] == [False, True, False]
    s.num_placeholders = 1
    assert [s.needs_token_at(position) for position in (3, 4, 5)] == [False, False, True]
    s.is_finished = True
    assert not s.needs_token_at(5)


def test_drafts_need_the_last_token() -> None:
    s = sequence([1, 2], prompt_lookup=PromptLookup(2))
    assert s.propose_draft(2) == (3, 1)
    assert s.propose_draft(1) == (3,)
    assert s.propose_draft(0) == ()
    s.num_placeholders = 1
    assert s.propose_draft(2) == ()
    assert sequence([1, 2]).propose_draft(2) == ()
