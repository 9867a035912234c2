"""Bodies that no client should send: the cost of a refusal, and its form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.body import Body, _check_headers, from_validation
from nanochat_ray.serve.openai.errors import MAX_MESSAGE, ApiError
from nanochat_ray.serve.openai.schema import requests
from nanochat_ray.serve.openai.schema.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
)
from nanochat_ray.serve.responses.schema import ResponsesRequest
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import post, serving

TOK = Tokenizer.bytes_only()
MANY = 20_000
USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(build_app(ScriptedClient([65]), TOK, "tiny", 256)) as url:
        yield url


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], **fields}


WRONG: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": [-1] * MANY}),
    (CompletionRequest, {"prompt": [[-1]] * MANY}),
    (CompletionRequest, {"prompt": [{}] * MANY}),
    (CompletionRequest, {"prompt": "x", "stop": [1] * MANY}),
    (CompletionRequest, {"prompt": "x", "stop_token_ids": [-1] * MANY}),
    (CompletionRequest, {"prompt": "x", "logit_bias": {f"{i}x": 1 for i in range(MANY)}}),
    (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "1" for i in range(MANY)}}),
    (ChatRequest, {"messages": [{}] * MANY}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    (ChatRequest, {"messages": [{"role": "user", "content": [1] * MANY}] * 2}),
    (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [1] * MANY}]}),
    (ChatRequest, chat(tools=[1] * MANY)),
    (ChatRequest, chat(structured_outputs={"choice": [1] * MANY})),
    (DetokenizeRequest, {"tokens": [-1] * MANY}),
    (ResponsesRequest, {"input": "x", "metadata": {str(i): i for i in range(MANY)}}),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_validation_stops_at_the_first_error(case: int) -> None:
    model, body = WRONG[case]
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 8  # one for each branch of a union


def test_every_list_of_a_body_stops_early() -> None:
    def lists(schema: Any) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if schema.get("type") in ("list", "dict") and (
                "fail_fast" in schema or len(schema) > 1
            ):
                yield schema
            for inner in schema.values():
                yield from lists(inner)
        elif isinstance(schema, list | tuple):
            for inner in schema:
                yield from lists(inner)

    models = [m for m in vars(requests).values() if isinstance(m, type) and issubclass(m, Body)]
    for model in (*models, ResponsesRequest):
        assert all(each.get("fail_fast") for each in lists(model.__pydantic_core_schema__))


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([65, 66, -1], "prompt[2]"),
        (["a", "b", 3], "prompt[2]"),
        ([[65], [66, "x"]], "prompt[1][1]"),
        (5, "prompt"),
    ],
)
def test_the_branch_that_came_furthest_is_named(url: str, prompt: Any, param: str) -> None:
    error = post(f"{url}/v1/completions", json={"prompt": prompt}).json()["error"]
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    ("problems", "param", "message"),
    [
        ([("missing", ("body",), "Field required")], None, "A JSON object is needed as the body."),
        ([("type", ("body",), "Input should be a dictionary")], None, "Input should be"),
        ([("value_error", ("body",), "Value error, top_k=-1 is bad")], "top_k", "top_k=-1 is bad"),
        ([("missing", ("body", "prompt"), "Field required")], "prompt", "prompt: Field required"),
        ([("value_error", ("body", "n"), "seed: no")], "n", "n: seed: no"),
        # Of the branches of a union: the deepest, then the one with most items that are right.
        ([("a", ("body", "x", "str"), "A"), ("b", ("body", "x", "list", 0), "B")], "x[0]", "B"),
        ([("a", ("body", "x", 5), "A"), ("b", ("body", "x", 0, 0), "B")], "x[0][0]", "B"),
        ([("a", ("body", "x", 1, 0), "A"), ("b", ("body", "x", 0, 5), "B")], "x[1][0]", "A"),
        ([("a", ("body", "x", "int"), "A"), ("b", ("body", "x", "str"), "B")], "x", "x: A or B"),
        ([("a", ("body", "x"), "A"), ("b", ("body", "y", 0), "B")], "x", "x: A"),
    ],
)
def test_one_problem_names_its_field(
    problems: list[tuple[str, tuple[int | str, ...], str]], param: str | None, message: str
) -> None:
    error = from_validation([{"type": t, "loc": loc, "msg": text} for t, loc, text in problems])
    assert (error.status, error.param) == (400, param)
    assert message in error.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 3}, "temperature=3 is not allowed: less than or equal to 2"),
        ({"temperature": "hot"}, "temperature='hot' is not allowed: a valid number"),
        ({"logprobs": 1.0}, "logprobs=1.0 is not allowed: a valid integer"),
        ({"stop": 5}, "stop=5 is not allowed: a valid string or a valid list"),
        ({"prompt": {"a": 1}}, "prompt={…} is not allowed: a valid string or a valid list"),
        ({"seed": ["x"] * 100_000}, "seed=[…] is not allowed: a valid integer"),
        ({"model": None, "prompt": None}, "prompt=None is not allowed: "),
        ({"response_format": {"type": "xml"}}, "response_format.type='xml' is not allowed: 'text'"),
    ],
)
def test_a_wrong_value_is_named(url: str, fields: dict[str, Any], message: str) -> None:
    error = post(f"{url}/v1/completions", json={"prompt": "x", **fields}).json()["error"]
    assert error["message"].startswith(message)


JSON = {"content-type": "application/json"}
ODD: list[tuple[bytes, dict[str, str], int]] = [
    (b"", JSON, 400),
    (b"  ", JSON, 400),
    (b"[1]", JSON, 400),
    (b'"x"', JSON, 400),
    (b"[" * 100_000, JSON, 400),
    (b'{"a":' * 100_000, JSON, 400),
    (b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}", JSON, 400),
    (b'{"prompt": "x", "seed": ' + b"9" * 1000 + b"}", JSON, 400),
    (b'{"prompt": "x", "temperature": NaN}', JSON, 400),
    (b'{"prompt": "x", "temperature": -Infinity}', JSON, 400),
    (b'{"prompt": "x", "temperature": 1e999}', JSON, 400),
    (b'{"prompt": "\xff"}', JSON, 400),
    (b'{"prompt": "\xed\xa0\x80"}', JSON, 400),
    (b'{"prompt": "\\ud8"}', JSON, 400),
    ('{"prompt": "x"}'.encode("utf-16"), JSON, 400),
    (b'\xef\xbb\xbf{"prompt": "x"}', JSON, 200),
    (b"\xef\xbb\xbf", JSON, 400),
    (b'{"prompt": "x"} x', JSON, 400),
    (b'{"prompt": "x"', JSON, 400),
    (b'{"prompt": "x", "prompt": 1}', JSON, 400),
    (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415),
    (b'{"prompt": "x"}', {"content-type": "multipart/form-data; boundary=x"}, 415),
    (b'{"prompt": "x"}', {}, 415),
    (b"\x1f\x8b\x08", {**JSON, "content-encoding": "gzip"}, 415),
    (b'{"prompt": "x"}', {"content-type": "application/json; charset=utf-8"}, 200),
    (b'{"prompt": "x\\ud83d\\ude42\\ud83d\\\\ud83d"}', JSON, 200),
]


@pytest.mark.parametrize("case", range(len(ODD)))
def test_odd_bodies_are_the_clients_error(url: str, case: int) -> None:
    body, headers, status = ODD[case]
    response = post(f"{url}/v1/completions", content=body, headers=headers)
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]


@pytest.mark.parametrize("field", ["model", "role", "key"])
def test_no_megabyte_is_echoed(url: str, field: str) -> None:
    long = "x" * 1_000_000
    body: dict[str, Any] = {
        "model": {"prompt": "x", "model": long},
        "role": {"messages": [{"role": long, "content": "x"}]},
        "key": {"prompt": "x", "logit_bias": {long: 1}},
    }[field]
    path = "chat/completions" if field == "role" else "completions"
    response = post(f"{url}/v1/{path}", content=json.dumps(body).encode(), headers=JSON)
    assert response.status_code in (400, 404)
    assert len(response.json()["error"]["message"]) <= MAX_MESSAGE + 1
    assert len(response.content) < 4 * MAX_MESSAGE


@pytest.mark.parametrize(
    ("content_type", "encoding", "code"),
    [
        ("application/json", None, None),
        ("Application/JSON; charset=utf-8", "", None),
        (" application/vnd.api+json ;a=b", " Identity ", None),
        (None, None, "content_type"),
        ("", None, "content_type"),
        ("text/plain", None, "content_type"),
        ("text/json", None, "content_type"),
        ("text/x+json", None, "content_type"),
        ("application/xjson", None, "content_type"),
        ("application/jsonp", None, "content_type"),
        ("application/json", "gzip", "content_encoding"),
        ("application/json", "br", "content_encoding"),
        ("application/json", "gzip, identity", "content_encoding"),
    ],
)
def test_only_plain_json_is_read(
    content_type: str | None, encoding: str | None, code: str | None
) -> None:
    """A page of another origin may send the other types without a preflight."""
    if code is None:
        _check_headers(content_type, encoding)
        return
    with pytest.raises(ApiError) as refusal:
        _check_headers(content_type, encoding)
    assert (refusal.value.status, refusal.value.code) == (415, code)
