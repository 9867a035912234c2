"""Allowed ranges of requests, to their bounds, and their form on the wire."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from nanochat_ray.engine.request import (
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)

INF = math.inf


@pytest.mark.parametrize(
    ("field", "values", "others"),
    [
        ("temperature", [0, 1e-9, 1e300], [-1e-9, math.nan, INF, "1"]),
        ("top_k", [0, 1, 2**31 - 1], [-1, 1.0, True, 2**31]),
        ("top_p", [1e-9, 0.5, 1], [0, 1.0001, math.nan]),
        ("min_p", [0, 0.5, 1], [-1e-9, 1.0001, math.nan]),
        ("repetition_penalty", [1e-9, 2, 1e9], [0, -1, INF]),
        ("presence_penalty", [-2, 0, 2], [-2.001, 2.001, math.nan]),
        ("frequency_penalty", [-2, 0, 2], [-2.001, 2.001, math.nan]),
        ("logit_bias", [{0: -100}, {7: 100}], [{-1: 0}, {1: 100.1}, {1: -100.1}, {1: math.nan}]),
        ("seed", [None, -(2**63), 0, 2**64 - 1], [-(2**63) - 1, 2**64, 1.0, True]),
        ("max_tokens", [1, 256, 2**31 - 1], [0, -1, 1.0, True, 2**31]),
        ("min_tokens", [0, 256], [-1, 257, False]),
        ("stop", [(), ("a",)], [("",), ("a", 1)]),
        ("stop_ids", [(), (0,)], [("a",), (True,)]),
        ("eos_ids", [(), (0,)], [("a",), (1.0,)]),
        ("logprobs", [None, 0, 20], [-1, 21, True, 1.0]),
        ("prompt_logprobs", [None, 0, 20], [-1, 21, True]),
        ("prompt_logprobs_start", [1, 99], [0, True]),
    ],
)
def test_ranges_to_their_bounds(field: str, values: list[Any], others: list[Any]) -> None:
    for value in values:
        SamplingParams(**{field: value})
    for value in others:
        with pytest.raises(ValueError, match=f"^{field}="):
            SamplingParams(**{field: value})


def test_no_output_needs_prompt_logprobs() -> None:
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0
    with pytest.raises(ValueError, match="max_tokens=-1 is not allowed: from 0"):
        SamplingParams(max_tokens=-1, prompt_logprobs=0)


@pytest.mark.parametrize(
    ("kind", "values", "others"),
    [
        ("json_schema", [{}, {"type": "string"}, True, False], [None, "x", []]),
        ("json_object", [True], [False, None, {}]),
        ("regex", ["a*"], ["", None, 1]),
        ("lark", ["start: A"], ["", {}]),
        ("choice", [["a"], ("a", "b")], [[], [""], ["a", 1], "a"]),
        (
            "structures",
            [
                [{"begin": "a", "schema": {}, "end": ""}],
                ({"begin": "a", "schema": True, "end": ""},),
            ],
            [
                *([], {}, [1], [{"begin": "", "schema": {}, "end": ""}]),
                *([{"begin": "a", "schema": {}}], [{"begin": "a", "schema": [], "end": ""}]),
                [{"begin": "a", "schema": {}, "end": "b"}, {"schema": {}, "end": "b"}],
            ],
        ),
    ],
)
def test_shapes_of_grammars(kind: str, values: list[Any], others: list[Any]) -> None:
    for value in values:
        SamplingParams(grammar={kind: value})
    for value in others:
        with pytest.raises(ValueError, match=rf"^grammar\.{kind}="):
            SamplingParams(grammar={kind: value})


@pytest.mark.parametrize(
    "grammar", [{}, {"gbnf": "x"}, {"regex": "a", "json_object": True}, "a", ["regex"]]
)
def test_a_grammar_has_one_kind(grammar: Any) -> None:
    with pytest.raises(ValueError, match=r"^grammar="):
        SamplingParams(grammar=grammar)


def test_stop_tokens() -> None:
    fields: dict[str, Any] = {"stop_ids": [1, 2], "eos_ids": [2, 3]}
    assert SamplingParams(**fields).all_stop_ids == {1, 2, 3}
    assert SamplingParams(**fields, ignore_eos=True).all_stop_ids == {1, 2}


@pytest.mark.parametrize(
    ("field", "values", "others"),
    [
        ("deadline", [None, 0, 1e9], [INF, math.nan, "soon"]),
        ("priority", [-5, 0, 5], [0.5, True, None]),
        ("cache_scope", ["", "a"], [None, 1]),
        ("weight_version", ["", "a"], [None, 1]),
    ],
)
def test_fields_of_requests(field: str, values: list[Any], others: list[Any]) -> None:
    for value in values:
        Request(id="a", prompt=[1], **{field: value})
    for value in others:
        with pytest.raises(ValueError, match=f"^{field}="):
            Request(id="a", prompt=[1], **{field: value})


def test_a_seed_is_drawn_once() -> None:
    request = Request(id="a", prompt=[1])
    one, two = request.with_seed(), request.with_seed()
    assert one.params.seed is not None
    assert one.params.seed != two.params.seed
    assert one.with_seed() is one
    zero = Request(id="a", prompt=[1], params=SamplingParams(seed=0))
    assert zero.with_seed() is zero


def test_everything_survives_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(
        temperature=0.5, top_k=3, logit_bias={4: 1.5}, stop=("a",), stop_ids=(7,), eos_ids=(8,),
        seed=2**64 - 1, max_tokens=9, min_tokens=2, grammar={"json_schema": {"const": 2**70}},
        logprobs=1, prompt_logprobs=0, prompt_logprobs_start=2, ignore_eos=True,
    )  # fmt: skip
    request = Request(
        id="r", prompt=(1, 2), params=params, output_token_ids=(3,), priority=-1, client="c",
        cache_scope="s", weight_version="w", deadline=9.5,
    )  # fmt: skip
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    wire = json.dumps(request.to_wire())
    monkeypatch.setattr(time, "monotonic", lambda: 1007.0)  # on another machine
    again = Request.from_wire(json.loads(wire))
    assert again.params == params
    assert (again.prompt, again.output_token_ids) == ([1, 2], [3])
    assert (again.priority, again.client, again.cache_scope) == (-1, "c", "s")
    assert (again.weight_version, again.deadline) == ("w", 1009.5)


def test_outputs_survive_the_wire() -> None:
    logprob = TokenLogprob(logprob=-1.5, top=[(3, -0.5)])
    output = RequestOutput(
        request_id="r", tokens=[1, 2], tool_token_indices=[1], finish="stop", error="e",
        logprobs=[logprob, None], prompt_logprobs=[logprob], complete=True, cached_tokens=16,
        weight_version="w",
    )  # fmt: skip
    assert RequestOutput.from_wire(json.loads(json.dumps(output.to_wire()))) == output
    empty = RequestOutput(request_id="r")
    assert empty.to_wire() == {"id": "r", "tokens": []}
    assert RequestOutput.from_wire(empty.to_wire()) == empty


def test_the_stop_token_is_no_text() -> None:
    ends: list[tuple[Any, bool]] = [
        ("stop", False),
        ("stop", True),
        ("length", False),
        (None, False),
    ]
    outputs = [RequestOutput(request_id="r", finish=f, complete=c) for f, c in ends]
    assert [output.last_token_is_stop for output in outputs] == [True, False, False, False]
