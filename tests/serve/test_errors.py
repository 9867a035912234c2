"""Each kind of failure as a client sees it: status, headers, and OpenAI's object."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nanochat_ray.serve.openai import errors
from nanochat_ray.serve.openai.errors import ApiError

OURS = ("retry-after", "www-authenticate", "x-should-retry")


def answer(error: ApiError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, error object without its message, and headers beyond those of every response."""
    response = error.response()
    fields = json.loads(bytes(response.body))["error"]
    assert fields.pop("message")
    return response.status_code, fields, {n: v for n, v in response.headers.items() if n in OURS}


def fields(kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"type": kind, "param": param, "code": code}


@pytest.mark.parametrize(
    ("error", "status", "body", "headers"),
    [
        (errors.invalid("x", "n", "c"), 400, fields("invalid_request_error", "c", "n"), {}),
        (errors.unknown_model("a", "b"), 404,
         fields("invalid_request_error", "model_not_found", "model"), {}),
        (errors.queue_full("x", 2.5), 429, fields("rate_limit_error", "queue_full"),
         {"retry-after": "3"}),
        (errors.unavailable("x"), 503, fields("server_error", "engine_unavailable"),
         {"retry-after": "2"}),
        (errors.request_timeout("x"), 504, fields("server_error", "request_timeout"),
         {"x-should-retry": "false"}),
        (errors.engine_failed("x"), 500, fields("server_error", "engine_failed"), {}),
        (errors.internal(), 500, fields("server_error"), {}),
        (ApiError(401, "x"), 401, fields("invalid_request_error"), {"www-authenticate": "Bearer"}),
    ],
)  # fmt: skip
def test_each_failure(
    error: ApiError, status: int, body: dict[str, Any], headers: dict[str, str]
) -> None:
    assert answer(error) == (status, body, headers)


@pytest.mark.parametrize(
    ("seconds", "header"),
    [(-5.0, "1"), (0.0, "1"), (1.0, "1"), (1.01, "2"), (59.5, "60"), (60.0, "60"), (1e9, "60")],
)
def test_retry_after_is_in_whole_seconds(seconds: float, header: str) -> None:
    assert answer(errors.queue_full("x", seconds))[2] == {"retry-after": header}
    assert answer(errors.queue_full("x"))[2] == {"retry-after": "1"}


def test_long_texts_of_clients_are_cut() -> None:
    assert ApiError(400, "x" * 500).message == "x" * 500
    assert ApiError(400, "x" * 501).message == "x" * 500 + "…"
    assert ApiError(400, "\ud800é", param="\ud800").body()["error"]["message"] == "?é"
    assert ApiError(400, "x", param="\ud800").param == "?"
    assert ApiError(400, "x", param="p" * 101).param == "p" * 100


@pytest.mark.parametrize(
    ("text", "grammar_field", "message", "param"),
    [
        ("top_k=-1 is not allowed", "", "top_k=-1 is not allowed", "top_k"),
        ("messages[0].role: x", "", "messages[0].role: x", "messages[0].role"),
        ("grammar: too large", "guided_regex", "guided_regex: too large", "guided_regex"),
        ("grammar.regex='' x", "guided_regex", "guided_regex.regex='' x", "guided_regex.regex"),
        ("grammars=2 wait", "guided_regex", "grammars=2 wait", "grammars"),
        ("grammar: x", "", "grammar: x", "grammar"),
        ("no grammar: x", "f", "no grammar: x", None),
    ],
)
def test_errors_of_the_engine_name_their_field(
    text: str, grammar_field: str, message: str, param: str | None
) -> None:
    error = errors.invalid_field(ValueError(text), grammar_field)
    assert (error.status, error.message, error.param) == (400, message, param)
