"""/openapi.json: every field has a description and its range, and real answers fit their schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from nanochat_ray.serve.app import STREAMS, build_app
from nanochat_ray.text.chat import tool_delimiters
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import get, post, serving

TOK = Tokenizer.bytes_only()
IDS = tool_delimiters(TOK)
CALCULATION = [IDS.call_start, *TOK.encode("1+1"), IDS.call_end]
CALCULATION += [IDS.result_start, *TOK.encode("2"), IDS.result_end]
FUNCTION = {"name": "ping", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = [IDS.call_start, *TOK.encode('{"name":"ping","arguments":{}}'), IDS.call_end]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = [{"role": "user", "content": "hi"}]
USAGE = {"stream_options": {"include_usage": True}}
GET = ("/health", "/version", "/v1/models", "/v1/models/tiny", "/tokenizer_info")


@pytest.fixture(scope="module")
def engine() -> ScriptedClient:
    return ScriptedClient([])


@pytest.fixture(scope="module")
def url(engine: ScriptedClient) -> Iterator[str]:
    with serving(build_app(engine, TOK, "tiny", 256)) as url:
        yield url


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    return get(f"{url}/openapi.json").json()


def fields(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, schema in document["components"]["schemas"].items():
        for field, definition in schema.get("properties", {}).items():
            yield f"{name}.{field}", definition


def numbers(schema: Any) -> Iterator[dict[str, Any]]:
    """Schemas of numbers inside a field, but not those of other objects."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield schema
        for inner in schema.values():
            yield from numbers(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from numbers(inner)


def test_every_field_has_a_description(document: dict[str, Any]) -> None:
    assert sum(1 for _ in fields(document)) > 190
    assert [name for name, field in fields(document) if not field.get("description")] == []


def test_every_number_has_its_range(document: dict[str, Any]) -> None:
    bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    without = [
        name
        for name, field in fields(document)
        for number in numbers(field)
        if "const" not in number and not bounds & number.keys()
    ]
    assert without == []
    requests = ("ChatRequest.", "CompletionRequest.", "ResponsesRequest.")
    open_above = [
        name
        for name, field in fields(document)
        if name.startswith(requests)
        for number in numbers(field)
        if not {"maximum", "exclusiveMaximum"} & number.keys()
    ]
    # The server's limit on choices is a setting.
    assert open_above == ["ChatRequest.n", "CompletionRequest.n", "CompletionRequest.best_of"]


def test_ranges_of_the_chat_request(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"]["ChatRequest"]["properties"]
    temperature = properties["temperature"]["anyOf"][0]
    assert temperature == {"type": "number", "minimum": 0, "maximum": 2}
    top_p = properties["top_p"]["anyOf"][0]
    assert (top_p["exclusiveMinimum"], top_p["maximum"]) == (0, 1)
    assert properties["top_logprobs"]["anyOf"][0]["maximum"] == 20


def test_every_answer_has_a_schema(document: dict[str, Any]) -> None:
    paths = {k: v for k, v in document["paths"].items() if k != "/metrics"}  # plain text
    for path, methods in paths.items():
        for method, operation in methods.items():
            content = operation["responses"]["200"]["content"]
            assert all(body["schema"] for body in content.values()), (path, method)
            assert operation["responses"]["4XX"]["content"]["application/json"]["schema"]
    for path in STREAMS:
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}


def check(document: dict[str, Any], path: str, method: str, kind: str, answer: Any) -> None:
    """Validates; a field that the schema does not have fails too."""
    schema = document["paths"][path][method]["responses"]["200"]["content"][kind]["schema"]
    schemas = {
        name: {**each, "additionalProperties": False} if "properties" in each else each
        for name, each in document["components"]["schemas"].items()
    }
    jsonschema.validate(answer, {**schema, "components": {"schemas": schemas}})


ANSWERS: list[tuple[str, dict[str, Any], list[int]]] = [
    (CHAT, {"messages": USER, "n": 2, "logprobs": True, "top_logprobs": 1}, TOK.encode("é!")),
    (CHAT, {"messages": USER}, [*CALCULATION, 65]),
    (CHAT, {"messages": USER, "tools": [TOOL]}, [65, *CALL]),
    (CHAT, {"messages": USER, "tools": [TOOL], "tool_choice": "required"}, CALL[1:]),
    (COMPLETIONS, {"prompt": "hi", "echo": True, "logprobs": 1}, TOK.encode("é!")),
    (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 1}, TOK.encode("xyz")),
    (RESPONSES, {"input": "hi", "top_logprobs": 1, "max_output_tokens": 2}, TOK.encode("abc")),
    (RESPONSES, {"input": "hi", "tools": [{"type": "function", **FUNCTION}]}, [65, *CALL]),
    (
        RESPONSES,
        {"input": "hi", "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"},
        CALL[1:],
    ),
]


@pytest.mark.parametrize(("path", "body", "tokens"), ANSWERS)
def test_answers_fit_their_schema(
    url: str,
    document: dict[str, Any],
    engine: ScriptedClient,
    path: str,
    body: dict[str, Any],
    tokens: list[int],
) -> None:
    engine.tokens = tokens
    whole = post(url + path, json=body)
    assert whole.status_code == 200, whole.text
    check(document, path, "post", "application/json", whole.json())
    if path not in STREAMS:
        return
    options = {"stream": True} if path == RESPONSES else {"stream": True, **USAGE}
    stream = post(url + path, json={**body, **options})
    lines = [line for line in stream.text.split("\n") if line.startswith("data: {")]
    assert len(lines) > 2
    for line in lines:
        check(document, path, "post", "text/event-stream", json.loads(line[6:]))


def test_a_failed_response_fits_its_schema(
    url: str, document: dict[str, Any], engine: ScriptedClient
) -> None:
    engine.tokens, engine.break_after = TOK.encode("abc"), 2
    stream = post(url + RESPONSES, json={"input": "hi", "stream": True})
    engine.break_after = None
    last = [line for line in stream.text.split("\n") if line.startswith("data: {")][-1]
    assert json.loads(last[6:])["type"] == "response.failed"
    check(document, RESPONSES, "post", "text/event-stream", json.loads(last[6:]))


def test_other_answers_fit_their_schema(
    url: str, document: dict[str, Any], engine: ScriptedClient
) -> None:
    for path in GET:
        template = "/v1/models/{model}" if path == "/v1/models/tiny" else path
        check(document, template, "get", "application/json", get(url + path).json())
    ids = post(f"{url}/tokenize", json={"prompt": "hi"}).json()
    check(document, "/tokenize", "post", "application/json", ids)
    text = post(f"{url}/detokenize", json={"tokens": ids["tokens"]}).json()
    check(document, "/detokenize", "post", "application/json", text)
    engine.tokens = TOK.encode("x")
    scores = post(url + COMPLETIONS, json={"prompt": [65, 66], "prompt_logprobs": 1}).json()
    check(document, COMPLETIONS, "post", "application/json", scores)
    error = post(url + CHAT, json={}).json()
    schema = document["components"]["schemas"]["ErrorResponse"]
    jsonschema.validate(error, {**schema, "components": document["components"]})
