"""From the outputs of an engine to the deltas of an answer, and what is counted of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from nanochat_ray.engine.detokenizer import ToolResultEvent
from nanochat_ray.engine.request import (
    EngineFull,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
    WeightsReplacedError,
)
from nanochat_ray.serve.client import UnavailableError
from nanochat_ray.serve.generation import (
    Choice,
    DeadlineError,
    Delta,
    EngineFailedError,
    GenerationRequest,
    GrammarError,
    generate,
)
from nanochat_ray.serve.metrics import PrometheusSink, RequestMetrics
from nanochat_ray.text.chat import tool_delimiters
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tool_calls import CallDelta, ToolChoice
from tests.serve.scripted import ScriptedClient
from tests.serve.test_metrics import values

TOK = Tokenizer.bytes_only()
IDS = tool_delimiters(TOK)
END = TOK.special("<|assistant_end|>")
CALCULATOR = ToolChoice("auto", ("calculator",), calculator=True)
SUM = [IDS.call_start, *TOK.encode("1+1"), IDS.call_end]


def generation(
    count: int = 1,
    stop: Sequence[str] = (),
    tool_choice: ToolChoice | None = None,
    return_token_ids: bool = False,
) -> GenerationRequest:
    params = SamplingParams(seed=0, max_tokens=50, eos_ids=(END,))
    requests = [Request(id=str(i), prompt=[1, 2, 3], params=params) for i in range(count)]
    return GenerationRequest(
        requests=requests,
        prefixes=[""] * count,
        stop=list(stop),
        stream=False,
        include_usage=False,
        logprobs=False,
        prompt_tokens=3,
        tool_choice=tool_choice or ToolChoice(),
        return_token_ids=return_token_ids,
        n=count,
        candidates=count,
    )


def run(
    engine: ScriptedClient, request: GenerationRequest, most: int = 10**6
) -> tuple[list[Delta], dict[str, float]]:
    """At most so many deltas, and the metrics of them."""
    sink = PrometheusSink("tiny")
    deltas: list[Delta] = []

    async def read() -> None:
        stream = generate(engine, TOK, RequestMetrics(sink), request, 7.0)
        async for batch in stream:
            deltas.extend(batch)
            if len(deltas) >= most:
                break
        await stream.aclose()

    asyncio.run(read())
    return deltas, values(sink)


def test_an_answer_is_counted() -> None:
    engine = ScriptedClient(TOK.encode("abc"))
    deltas, metrics = run(engine, generation(return_token_ids=True))
    assert "".join(delta.text for delta in deltas) == "abc"
    assert [t for delta in deltas for t in delta.token_ids] == [*TOK.encode("abc"), END]
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    assert deltas[0].weight_version == engine.weight_version
    assert metrics["prompt_tokens_total"] == 3
    assert metrics["generation_tokens_total"] == 4  # the token that ends it too
    assert metrics["request_success_total stop"] == 1
    assert not engine.aborts


def test_tokens_behind_a_stop_string_are_cut() -> None:
    engine = ScriptedClient(TOK.encode("one two three"), finish=None)
    engine.per_step = 100
    deltas, metrics = run(engine, generation(stop=["two"], return_token_ids=True))
    assert [(d.text, d.finish_reason, d.num_tokens) for d in deltas] == [("one ", "stop", 7)]
    assert deltas[0].token_ids == TOK.encode("one two")
    assert metrics["generation_tokens_total"] == 7
    assert metrics["request_success_total stop"] == 1
    assert len(engine.aborts) == 1


def test_a_call_of_the_client_ends_the_answer() -> None:
    engine = ScriptedClient([*TOK.encode("a"), *SUM, *TOK.encode("b")])
    deltas, metrics = run(engine, generation(tool_choice=CALCULATOR))
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["tool_calls"]
    (call,) = [call for delta in deltas for call in delta.tool_calls]
    assert call == CallDelta('{"expression": "1+1"}', "calculator")
    assert metrics["request_success_total stop"] == 1
    assert len(engine.aborts) == 1
    assert "".join(delta.text for delta in deltas) == "a"


def test_the_calculator_of_the_engine_is_no_call() -> None:
    result = [IDS.result_start, *TOK.encode("2"), IDS.result_end]
    deltas, _ = run(ScriptedClient([*SUM, *result, *TOK.encode("b")]), generation())
    assert [r for delta in deltas for r in delta.tool_results] == [ToolResultEvent("1+1", "2")]
    assert [call for delta in deltas for call in delta.tool_calls] == []
    assert "".join(delta.text for delta in deltas) == "b"


def test_choices_are_counted_one_by_one() -> None:
    engine = ScriptedClient(TOK.encode("abcd"), finish=None)
    deltas, metrics = run(engine, generation(count=2), most=4)
    assert {delta.index for delta in deltas} == {0, 1}
    assert metrics["prompt_tokens_total"] == 6
    assert metrics["request_success_total abort"] == 2
    assert len(engine.aborts) == 2


@pytest.mark.parametrize(
    ("finish", "error", "kind", "message"),
    [
        ("error", "grammar: too large", GrammarError, "^grammar: too large$"),
        ("error", "deadline: it passed", DeadlineError, "not ready after 7 s, the limit"),
        ("error", "weights: replaced", UnavailableError, "^weights: replaced$"),
        ("error", "max_queue_size=9 wait", EngineFull, "^max_queue_size=9 wait$"),
        ("error", "max_queue_s=2: it has waited", EngineFull, "^max_queue_s=2: it has waited$"),
        ("error", "logits: not finite", EngineFailedError, "^logits: not finite$"),
        ("abort", None, EngineFailedError, r"^the engine ended the answer \(abort\)$"),
    ],
)
def test_failures_of_the_engine(
    finish: str, error: str | None, kind: type[Exception], message: str
) -> None:
    engine = ScriptedClient([], finish=finish)
    engine.error = error
    sink = PrometheusSink("tiny")

    async def read() -> None:
        async for _ in generate(engine, TOK, RequestMetrics(sink), generation(), 7.0):
            pass

    with pytest.raises(kind, match=message) as failure:
        asyncio.run(read())
    assert type(failure.value) is kind
    assert values(sink)["request_success_total error"] == 1


class SwappingClient(ScriptedClient):
    """Replaces its weights while the second request of an answer is submitted, so many times."""

    num_swaps = 0

    async def submit(self, request: Request, stream: Any) -> None:
        if self.num_swaps and len(self.requests) % 2 == 1:
            self.num_swaps -= 1
            self.requests.append(request)
            self.weight_version += "+"
            raise WeightsReplacedError("weights: replaced")
        await super().submit(request, stream)


def test_choices_have_the_same_weights() -> None:
    engine = SwappingClient(TOK.encode("ab"))
    engine.num_swaps, engine.weight_version = 2, "v"
    deltas, _ = run(engine, generation(count=2))
    assert [request.weight_version for request in engine.requests] == ["v"] * 2 + ["v+"] * 2 + [
        "v++"
    ] * 2
    assert len({request.id for request in engine.requests}) == 6
    assert ["".join(d.text for d in deltas if d.index == i) for i in (0, 1)] == ["ab", "ab"]
    assert len(engine.aborts) == 2  # the first requests of both tries
    engine = SwappingClient(TOK.encode("ab"))
    engine.num_swaps = 3
    with pytest.raises(UnavailableError, match="replaced 3 times in a row"):
        run(engine, generation(count=2))


def test_logprobs_belong_to_tokens_of_the_text() -> None:
    """Those of delimiters, of a call and of injected tokens are left out."""
    choice = Choice(TOK, 0, [], ToolChoice(), 0)
    tokens = [*TOK.encode("a"), *SUM, *TOK.encode("bé"), END]
    scores: list[TokenLogprob | None] = [
        TokenLogprob(logprob=-float(i), top=[]) for i in range(len(tokens))
    ]
    scores[7] = None  # of the first byte of "é", as if a tool had injected it
    output = RequestOutput(
        request_id="r",
        tokens=tokens,
        logprobs=scores,
        prompt_logprobs=[TokenLogprob(logprob=-9.0, top=[])],
        finish="stop",
        cached_tokens=16,
    )
    delta = choice.push(output)
    assert [(token, score.logprob) for token, score in delta.logprobs] == [
        (tokens[0], 0.0),
        (tokens[6], -6.0),
        (tokens[8], -8.0),
    ]
    assert [score and score.logprob for score in delta.prompt_logprobs] == [None, -9.0]
    assert (delta.num_tokens, delta.cached_tokens, delta.text) == (len(tokens), 16, "abé")


@pytest.mark.parametrize(
    ("mode", "reason", "finish"),
    [
        ("required", "stop", "tool_calls"),
        ("named", "stop", "stop"),
        ("required", "length", "length"),
    ],
)
def test_how_a_forced_call_ends(mode: Any, reason: Any, finish: str) -> None:
    grammar = {"structures": [{"begin": "x", "schema": {}, "end": "}"}]}
    choice = Choice(TOK, 0, [], ToolChoice(mode, ("f",), False, grammar), 0)
    text = '{"name":"f","arguments":{"a":1}}'
    output = RequestOutput(request_id="r", tokens=TOK.encode(text), finish=reason, complete=True)
    delta = choice.push(output)
    choice.finish(delta, reason)
    assert delta.finish_reason == finish
    arguments = "".join(call.arguments for call in delta.tool_calls)
    # The last brace is the call's if it is complete; if it is cut, it may be the arguments'.
    assert arguments == ('{"a":1}' if reason == "stop" else '{"a":1}}')
    assert [call.name for call in delta.tool_calls if call.name] == ["f"]


def test_only_empty_deltas_are_invisible() -> None:
    assert not Delta(0, num_tokens=1, cached_tokens=5, weight_version="v").is_visible
    for fields in (
        *({"text": "a"}, {"tool_results": [1]}, {"logprobs": [1]}, {"prompt_logprobs": [None]}),
        *({"tool_calls": [1]}, {"token_ids": [1]}, {"finish_reason": "stop"}),
    ):
        assert Delta(0, **fields).is_visible  # type: ignore[arg-type]
