"""Answers that must fit a grammar, and scores of the prompt: what goes to the engine and back."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import post

TOK = Tokenizer.bytes_only()
USER = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}

LARK = 'start: "a" | "b"'
GBNF = 'root ::= "a" | "b"'


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient(TOK.encode("CD"))


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"json_schema": SCHEMA},
        ),
        ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"json_schema": SCHEMA}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"choice": ["yes", "no"]}),
        ({"structured_outputs": {"regex": "[a-c]+"}}, {"regex": "[a-c]+"}),
        ({"structured_outputs": {"grammar": LARK}}, {"lark": LARK}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json_schema": SCHEMA}),
        ({"response_format": {"type": "json_object", "schema": {}}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, {"json_schema": SCHEMA}),
        ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
        ({"guided_json": json.dumps(SCHEMA), "grammar": ""}, {"json_schema": SCHEMA}),
        ({"guided_regex": "[a-c]+", "guided_json": None}, {"regex": "[a-c]+"}),
        ({"guided_choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
        ({"guided_grammar": LARK}, {"lark": LARK}),
        ({"grammar": GBNF, "response_format": {"type": "text"}}, {"lark": GBNF}),
        ({"json_schema": SCHEMA}, {"json_schema": SCHEMA}),
    ],
)
def test_grammars_reach_the_engine(
    url: str, engine: ScriptedClient, fields: dict[str, Any], grammar: dict[str, Any]
) -> None:
    for path, body in (("chat/completions", {"messages": USER}), ("completions", {"prompt": "x"})):
        response = post(f"{url}/v1/{path}", json={**body, **fields})
        assert response.status_code == 200, response.text
    for request in engine.requests:
        assert request.params.grammar == grammar


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"regex": "a", "json_object": True}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"json": "no json"}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}, "ignore_eos": True},
        {"structured_outputs": {"regex": "a"}, "min_tokens": 3},
        {"structured_outputs": {"structural_tag": {}}},
        {"structured_outputs": {"regex": "a", "grammar": "root ::= [a]"}},
        {"response_format": {"type": "text", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "json_schema": {"schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": "no object"}},
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        {"guided_json": "no json"},
        {"guided_json": "[" * 100_000},
        {"guided_regex": ""},
        {"guided_choice": []},
        {"guided_choice": "yes"},
        {"grammar": 1},
        {"grammar": GBNF, "json_schema": SCHEMA},
        {"json_schema": []},
    ],
)
def test_what_cannot_be_is_refused(refusing_url: str, fields: dict[str, Any]) -> None:
    body = {"messages": USER, **fields}
    response = post(f"{refusing_url}/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert 0 < len(message) < 500


def test_an_echoed_prompt_has_scores(client: openai.OpenAI) -> None:
    body = {
        "model": "tiny",
        "prompt": [65, 66],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 9,
    }
    choice = client.completions.create(**body).choices[0]
    assert choice.text == "ABCD"
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["A", "B", "C", "D"]
    assert logprobs.token_logprobs == [None, -0.66, -0.67, -0.68]
    assert logprobs.top_logprobs[:2] == [None, {"A": -0.5, "B": -0.66}]
    assert logprobs.text_offset == [0, 1, 2, 3]
    chunks = [c.choices[0] for c in client.completions.create(**body, stream=True)]
    assert "".join(c.text for c in chunks) == "ABCD"
    stream_answer = [x for c in chunks if c.logprobs for x in c.logprobs.token_logprobs]
    assert stream_answer == logprobs.token_logprobs
    assert [x for c in chunks if c.logprobs for x in c.logprobs.text_offset] == [0, 1, 2, 3]


def test_an_echo_comes_before_a_token_without_text(
    client: openai.OpenAI, engine: ScriptedClient
) -> None:
    engine.tokens = [TOK.special("<|output_end|>"), *engine.tokens]
    body = {
        "model": "tiny",
        "prompt": [65, 66],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 9,
    }
    chunks = [c.choices[0] for c in client.completions.create(**body, stream=True)]
    assert "".join(c.text for c in chunks) == "ABCD"
    assert [x for c in chunks if c.logprobs for x in c.logprobs.tokens] == ["A", "B", "C", "D"]
    assert [x for c in chunks if c.logprobs for x in c.logprobs.text_offset] == [0, 1, 2, 3]


def test_an_echo_s_tokens_are_the_text_s(client: openai.OpenAI) -> None:
    """Without the <|bos|> before it."""
    body = {"model": "tiny", "prompt": "AB", "echo": True, "logprobs": 0, "max_tokens": 9}
    logprobs = client.completions.create(**body).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["A", "B", "C", "D"]
    assert logprobs.text_offset == [0, 1, 2, 3]


def test_prompt_logprobs_in_vllm_s_form(url: str) -> None:
    body = {"prompt": [65, 66], "prompt_logprobs": 1, "max_tokens": 1}
    logprobs = post(f"{url}/v1/completions", json=body).json()["choices"][0]
    first, second = logprobs["prompt_logprobs"]
    assert first is None
    assert second["65"] == {"logprob": -0.5, "rank": 1, "decoded_token": "A"}
    assert second["66"] == {"logprob": -0.66, "rank": None, "decoded_token": "B"}
    assert logprobs["logprobs"] is None
    stream_answer = post(f"{url}/v1/completions", json={**body, "stream": True})
    assert stream_answer.status_code == 400
