"""Counters and reports of an engine, by hand, on a request or two."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest

from nanochat_ray.engine.request import RequestOutput
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tools import Tool
from tests.engine.engine_kit import ask, finish, make_engine, make_model, tokens

PROMPT = [*range(1, 41)]


def test_counters_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(start=0, step=0.5)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    engine = make_engine(make_model("classic"), max_num_seqs=1, num_speculative_tokens=0)
    engine.add(ask("a", PROMPT, max_tokens=3))
    engine.add(ask("b", PROMPT, max_tokens=2))
    outputs = {"a": engine.step()}
    assert outputs["a"] == []  # 24 tokens of the prompt
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.slots) == (1, 1, 1)
    assert (stats.prompt_tokens, stats.generated_tokens, stats.num_finished) == (24, 0, 0)
    results = finish(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.preemptions) == (0, 0, 0)
    # The last token of a prompt is not looked up; two blocks of 16 tokens are found.
    assert (stats.num_lookup_tokens, stats.num_hit_tokens) == (39 + 39, 32)
    assert stats.prompt_tokens == 40 + 8
    assert (stats.generated_tokens, stats.num_finished) == (5, 2)
    # "a" takes 24 and 16 tokens of its prompt, and two decodes; "b" one chunk and one decode.
    assert (stats.steps, stats.step_seconds) == (6, 6 * 0.5)
    assert [output.cached_tokens for output in results["b"]] == [32, 0]
    assert [output.cached_tokens for output in results["a"]] == [0, 0, 0]
    assert engine.step() == []
    assert engine.stats().steps == 6  # nothing ran


def test_a_step_that_only_commits_is_no_forward() -> None:
    engine = make_engine(make_model("classic"), async_scheduling="on", num_speculative_tokens=0)
    engine.add(ask("a", [1, 2], max_tokens=3))
    calls = 0
    while engine.has_work:
        engine.step()
        calls += 1
    assert (calls, engine.stats().steps, engine.stats().generated_tokens) == (4, 3, 3)


def test_without_a_prefix_cache_nothing_is_cached() -> None:
    engine = make_engine(make_model("classic"), prefix_cache_tokens=0)
    for name in "ab":
        engine.add(ask(name, PROMPT, max_tokens=2))
        assert [output.cached_tokens for output in finish(engine)[name]] == [0, 0]
    assert (engine.stats().num_lookup_tokens, engine.stats().num_hit_tokens) == (0, 0)


def test_an_idle_engine_counts_an_abort() -> None:
    engine = make_engine(make_model("classic"))
    engine.add(ask("a", [1]))
    assert engine.abort("a")
    assert engine.has_work
    assert engine.step() == [RequestOutput(request_id="a", finish="abort")]
    assert not engine.has_work


def test_a_reset_engine_has_no_outputs() -> None:
    engine = make_engine(make_model("classic"))
    for name in "ab":
        engine.add(ask(name, [1]))
    engine.abort("a")
    assert engine.reset() == ["b"]
    assert not engine.has_work
    assert engine.step() == []


def test_an_output_that_is_complete_already_ends_at_once() -> None:
    """The engine before this one was lost before it said so."""
    tokenizer = Tokenizer.bytes_only()
    engine = make_engine(make_model("classic"), None, tokenizer.byte_table())
    ids = tokenizer.encode("ab")
    engine.add(ask("a", [1], ids, grammar={"regex": "ab"}))
    engine.add(ask("b", [1], ids, stop_ids=(ids[-1],)))
    assert engine.step() == [
        RequestOutput(request_id="a", finish="stop", complete=True),
        RequestOutput(request_id="b", finish="stop"),
    ]
    assert not engine.has_work


def test_an_aborted_request_has_no_other_output() -> None:
    """Neither that of a tool, which an engine before this one did not report."""
    engine = make_engine(make_model("classic"), Tool(5, 6, 7, 8, lambda ids: [9, 9]))
    for name in "ab":
        engine.add(ask(name, [1], [5, 6, 7], max_tokens=20))
    engine.abort("a")
    outputs = [output for output in engine.step() if output.request_id == "a"]
    assert outputs == [RequestOutput(request_id="a", finish="abort")]
    assert not engine.abort("a")
    engine.reset()


def test_injected_tokens_are_named() -> None:
    """The model is made to end a call: 5 begins it, 6 ends it; 7 and 8 enclose the result."""
    engine = make_engine(make_model("classic"), Tool(5, 6, 7, 8, lambda ids: [9, 9]))
    engine.add(ask("a", [1], [5], max_tokens=20, logit_bias={6: 100.0}, logprobs=0))
    assert engine.step() == []  # the prompt; then the token that the other engine has sampled
    (first,) = engine.step()
    assert first.tokens == [6, 7, 9, 9, 8]
    assert first.tool_token_indices == [1, 2, 3, 4]
    assert first.logprobs is not None
    assert [entry is None for entry in first.logprobs] == [False, True, True, True, True]
    assert engine.stats().generated_tokens == 5
    engine.reset()


def test_a_missing_tool_output_is_reported() -> None:
    engine = make_engine(make_model("classic"), Tool(5, 6, 7, 8, lambda ids: [9, 9]))
    engine.weight_version = "w"
    engine.add(ask("a", [1], [5, 6, 7], max_tokens=6))
    (first,) = engine.step()
    assert (first.tokens, first.tool_token_indices, first.finish) == (
        [9, 9, 8],
        [0, 1, 2],
        "length",
    )
    assert first.weight_version == "w"
    assert not engine.has_work


def test_weights_are_named_once() -> None:
    engine = make_engine(make_model("classic"))
    engine.weight_version = "w1"
    engine.add(ask("a", [1, 2], max_tokens=3))
    versions = [output.weight_version for output in finish(engine)["a"]]
    assert versions == ["w1", "", ""]


def test_requests_without_output_begin_again_elsewhere() -> None:
    engine = make_engine(make_model("classic"), max_num_seqs=1, num_speculative_tokens=0)
    for name in ("runs", "waits", "bound", "last"):
        version = "w" if name == "bound" else ""  # it continues an answer of these weights
        engine.add(dataclasses.replace(ask(name, [1]), weight_version=version))
    engine.step()
    assert [request.id for request in engine.withdraw_waiting()] == ["waits", "last"]
    assert engine.stats().waiting == 1
    requests, outputs = engine.interrupt("weights: replaced")
    assert requests == []
    assert {output.request_id: output.error for output in outputs} == {
        "runs": "weights: replaced",
        "bound": "weights: replaced",
    }
    assert not engine.has_work
    engine.check_integrity()


def test_a_failing_tool_ends_its_request() -> None:
    def run(ids: list[int]) -> list[int]:
        raise ZeroDivisionError("of the tool")

    engine = make_engine(make_model("classic"), Tool(5, 6, 7, 8, run))
    engine.add(ask("a", [1], [5], logit_bias={6: 100.0}))
    engine.add(ask("b", [1], max_tokens=2))
    results = finish(engine)
    assert results["a"][-1].error == "ZeroDivisionError: of the tool"
    assert len(tokens(results["b"])) == 2
    assert engine.stats().num_finished == 2


def test_accepted_drafts_are_counted() -> None:
    """Token 7 always follows, so all drafts of it are accepted."""
    engine = make_engine(
        make_model("classic"), num_speculative_tokens=3, prompt_lookup_max=1, max_num_seqs=1
    )
    engine.add(ask("a", [7, 7], max_tokens=9, logit_bias={7: 100.0}))
    assert tokens(finish(engine)["a"]) == [7] * 9
    stats = engine.stats()
    # One token behind the prompt, then four a step: three drafts and one behind them.
    assert (stats.num_draft_tokens, stats.num_accepted_tokens, stats.steps) == (6, 6, 3)
    assert stats.generated_tokens == 9
