"""What a request must satisfy, and the state that it starts with, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nanochat_ray.engine.admission import Admission, Admitter
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.draft import PromptLookup
from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.engine.prefill_cost import PrefillCostModel
from nanochat_ray.engine.request import Request
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tools import Tool
from tests.engine.engine_kit import ask

TOK = Tokenizer.bytes_only()
TOOL = Tool(20, 21, 22, 23, lambda ids: ids)


def admitter(**fields: Any) -> Admitter:
    values: dict[str, Any] = {"tool": None, "grammars": None, "config": EngineConfig()} | fields
    return Admitter(max_model_len=10, vocab_size=50, **values)


def admit(output_ids: list[int], fields: dict[str, Any] | None = None, **params: Any) -> Admission:
    return admitter(**(fields or {})).admit(ask("a", [1, 2, 3], output_ids, **params))


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([1] * 9, {}, None),
        ([1] * 10, {}, "prompt has 10 tokens, but the context holds 10"),
        ([1] * 10, {"max_tokens": 0, "prompt_logprobs": 0}, None),
        ([1] * 11, {"max_tokens": 0, "prompt_logprobs": 0}, "prompt has 11 tokens"),
        ([], {}, "prompt: it must have at least one token"),
        ([0, 49], {}, None),
        ([50], {}, "prompt=50 is not allowed: token ids from 0 to 49"),
        ([-1], {}, "prompt=-1"),
        ([1.5], {}, "prompt=1.5 is not allowed: token ids from 0 to 49"),
        (["a"], {}, "prompt='a' is not allowed: token ids from 0 to 49"),
        ([[1]], {}, r"prompt=\[1\] is not allowed: token ids from 0 to 49"),
        ([np.int64(1)], {}, None),
        ([1], {"logit_bias": {50: 1.0}}, "logit_bias=50"),
        ([1], {"stop_ids": (50,)}, "stop_ids=50"),
        ([1], {"eos_ids": (-1,)}, "eos_ids=-1"),
        ([1], {"grammar": {"regex": "a"}}, "grammar: this engine does not know the text"),
    ],
)
def test_what_an_engine_can_process(
    prompt: list[int], params: dict[str, Any], error: str | None
) -> None:
    if error is None:
        admitter().validate(ask("a", prompt, **params))
        return
    with pytest.raises(ValueError, match=error):
        admitter().validate(ask("a", prompt, **params))


@pytest.mark.parametrize("prompt", [np.array([1, 2]), torch.tensor([1, 2])])
def test_ids_of_arrays_are_a_list(prompt: Any) -> None:
    request = Request(id="a", prompt=prompt)
    admitter().validate(request)
    assert request.prompt == [1, 2]
    assert TOK.decode(prompt) == TOK.decode([1, 2])


def test_a_grammar_must_compile() -> None:
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    for regex, error in (("a+", None), ("(", "grammar: this regex does not compile")):
        request = ask("a", [1], grammar={"regex": regex})
        if error is None:
            admitter(grammars=grammars).validate(request)
        else:
            with pytest.raises(ValueError, match=error):
                admitter(grammars=grammars).validate(request)


def test_tokens_of_another_engine_count() -> None:
    admitter().validate(ask("a", [1] * 5, [2] * 4))
    with pytest.raises(ValueError, match="prompt has 10 tokens"):
        admitter().validate(ask("a", [1] * 5, [2] * 5))


@pytest.mark.parametrize(("max_tokens", "limit"), [(6, 6), (7, 7), (99, 7)])
def test_a_grammar_ends_with_the_context(
    monkeypatch: pytest.MonkeyPatch, max_tokens: int, limit: int
) -> None:
    """Its limit is in tokens of the output, of 10 less 3 of the prompt."""
    grammars, limits = Grammars(TOK.byte_table(), TOK.vocab_size), list[int]()
    start = grammars.start
    monkeypatch.setattr(grammars, "start", lambda *args: limits.append(args[-1]) or start(*args))
    admit([], {"grammars": grammars}, grammar={"regex": "a+"}, max_tokens=max_tokens)
    assert limits == [limit]


@pytest.mark.parametrize(("max_tokens", "max_length"), [(1, 4), (6, 9), (7, 10), (99, 10)])
def test_outputs_end_with_the_context(max_tokens: int, max_length: int) -> None:
    sequence = admit([], max_tokens=max_tokens).sequence
    assert sequence.max_length == max_length
    assert (sequence.tokens, sequence.prefill_spans) == ([1, 2, 3], [(0, 3)])
    assert (sequence.tool, sequence.grammar, sequence.prompt_logprobs) == (None, None, None)


def test_sequences_keep_their_parameters() -> None:
    sequence = admit([4], seed=7, stop_ids=(5,), eos_ids=(6,)).sequence
    assert (sequence.tokens, sequence.seed) == ([1, 2, 3, 4], 7)
    assert sequence.stop_token_ids == {5, 6}
    assert admit([], seed=None).sequence.seed == 0
    assert admit([], prompt_logprobs=1).sequence.prompt_logprobs == []
    assert admit([4], prompt_logprobs=1).sequence.prompt_logprobs is None  # reported already


@pytest.mark.parametrize(
    ("output_ids", "finish"),
    [([4], None), ([5], "stop"), ([5, 4], None), ([4] * 5, None), ([4] * 6, "length")],
)
def test_an_output_may_be_complete(output_ids: list[int], finish: str | None) -> None:
    assert admit(output_ids, stop_ids=(5,), max_tokens=6).finish == finish


@pytest.mark.parametrize(
    ("output_ids", "tool_tokens", "spans"),
    [
        ([20, 8], [], []),
        ([20, 8, 21], [22, 8, 23], [(5, 9)]),
        ([20, 8, 21, 22], [8, 23], [(5, 9)]),
        ([20, 8, 21, 22, 8, 23], [], [(5, 9)]),
    ],
)
def test_a_tools_output_is_completed(
    output_ids: list[int], tool_tokens: list[int], spans: list[tuple[int, int]]
) -> None:
    admission = admit(output_ids, {"tool": TOOL}, max_tokens=7)
    assert (admission.tool_tokens, admission.finish) == (tool_tokens, None)
    assert admission.sequence.tokens == [1, 2, 3, *output_ids, *tool_tokens]
    assert admission.sequence.prefill_spans == [(0, 3), *spans]


@pytest.mark.parametrize(
    ("max_tokens", "tool_tokens", "finish"),
    [(5, [22, 8], "length"), (6, [22, 8, 23], "length"), (7, [22, 8, 23], None)],
)
def test_a_completed_output_ends_at_the_limit(
    max_tokens: int, tool_tokens: list[int], finish: str | None
) -> None:
    admission = admit([20, 8, 21], {"tool": TOOL}, max_tokens=max_tokens)
    assert (admission.tool_tokens, admission.finish) == (tool_tokens, finish)


def test_grammars_go_without_tools() -> None:
    a, b = TOK.encode("ab")
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    each = Admitter(EngineConfig(), 10, TOK.vocab_size, TOOL, grammars)
    request = ask("a", [1], grammar={"regex": "ab"}, eos_ids=(TOK.bos,))
    prepared_mask = each.prepare(request)
    assert prepared_mask is not None
    prepared_mask.result()
    each.validate(request)
    assert each.prepare(ask("a", [1])) is None
    sequence = each.admit(request).sequence
    assert (sequence.tool, sequence.grammar is None) == (None, False)
    assert each.admit(ask("a", [1])).sequence.tool is not None
    one_token = ask("a", [1], [a], grammar={"regex": "ab"}, eos_ids=(TOK.bos,))
    assert each.admit(one_token).finish is None
    full = ask("a", [1], [a, b], grammar={"regex": "ab"}, eos_ids=(TOK.bos,))
    assert (each.admit(full).finish, each.admit(full).completes_grammar) == ("stop", True)


@pytest.mark.parametrize(
    ("tokens", "ngram", "count", "draft"),
    [
        ([1, 2, 3, 1, 2], 2, 3, [3, 1, 2]),
        ([1, 2, 3, 1, 2], 2, 1, [3]),
        ([1, 2, 3, 1, 2], 3, 3, []),  # "3, 1, 2" is new
        ([1, 2, 3, 1, 2], 2, 7, [3, 1, 2, 3, 1, 2, 3]),  # it continues to repeat itself
        ([1, 4, 1, 5, 1], 1, 2, [5, 1]),  # after the latest occurrence
        ([1, 2], 2, 3, []),
        ([1], 2, 3, []),
        ([7, 7, 7], 2, 2, [7, 7]),
    ],
)
def test_drafts_by_hand(tokens: list[int], ngram: int, count: int, draft: list[int]) -> None:
    assert PromptLookup(ngram).propose(tokens, count) == draft
    growing = PromptLookup(ngram)  # the same, token by token
    for end in range(1, len(tokens)):
        growing.propose(tokens[:end], count)
    assert growing.propose(tokens, count) == draft


@pytest.mark.parametrize(("count", "ngram"), [(0, 2), (1, 2), (4, 5)])
def test_drafts_are_as_configured(count: int, ngram: int) -> None:
    config = EngineConfig(num_speculative_tokens=count, prompt_lookup_max=ngram)
    lookup = admit([], {"config": config}).sequence.prompt_lookup
    assert (lookup and lookup.ngram) == (ngram if count else None)


def test_prefill_costs_by_hand() -> None:
    cost = PrefillCostModel(doubling_tokens=100, tokens_per_decode=3)
    assert [cost.token_cost(position) for position in (0, 50, 100, 300)] == [1, 1.5, 2, 4]
    assert PrefillCostModel().token_cost(300) == 1
    assert cost.budget(10, [(90, 90), (31, 1)], num_decodes=4) == 20
    assert cost.budget(10, [(90, 90)], num_decodes=4) == 12
    assert cost.budget(10, [(90, 90), (30, 30), (30, 5)], num_decodes=4) == 45
    # Measured: the benchmarks of the engine.
    assert PrefillCostModel.of_width(64) == PrefillCostModel(128, 3)
