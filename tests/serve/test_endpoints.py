"""Endpoints beside generation: whole responses, and what each refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from nanochat_ray.serve.app import VERSION, build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import get, post, serving

TOK = Tokenizer.bytes_only()
USER = [{"role": "user", "content": "hi"}]
UNNAMED = {"type": "function", "function": {"name": ""}}
UNNAMED_PATH = "tools[0].function.name"
ORIGIN = "https://a.example"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The endpoints change nothing, so that one server is enough."""
    engine = ScriptedClient(TOK.encode("hello"))
    app = build_app(engine, TOK, "org/tiny", 256, allowed_origins=[ORIGIN])
    with serving(app) as url:
        yield url


def test_models_are_described(url: str) -> None:
    (card,) = get(f"{url}/v1/models").json()["data"]
    assert abs(card.pop("created") - time.time()) < 3600
    assert card == {
        "id": "org/tiny",
        "object": "model",
        "owned_by": "nanochat_ray",
        "max_model_len": 256,
        "checkpoint": "step-000100-0a1b2c3d",
    }
    assert get(f"{url}/v1/models/org/tiny").json()["id"] == "org/tiny"
    assert get(f"{url}/v1/models").json()["object"] == "list"
    engine = ScriptedClient([])
    engine.weight_version = ""
    with serving(build_app(engine, TOK, "tiny", 256)) as other:
        assert get(f"{other}/v1/models/tiny").json()["checkpoint"] is None


def test_health_and_version(url: str) -> None:
    engines = [{"requests": 0}]
    want = {"status": "ok", "model": "org/tiny", "engines": engines}
    assert get(f"{url}/health").json() == want
    assert get(f"{url}/version").json() == {"version": VERSION}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param", "code"),
    [
        ("GET", "/v1/models/tiny", None, 404, "model", "model_not_found"),
        ("GET", "/v1/completions", None, 405, None, "method_not_allowed"),
        ("POST", "/v1/models", {}, 405, None, "method_not_allowed"),
        ("GET", "/v2", None, 404, None, "not_found"),
        ("POST", "/tokenize", {}, 400, None, None),
        ("POST", "/tokenize", {"prompt": "x", "messages": USER}, 400, None, None),
        ("POST", "/tokenize", {"messages": USER, "tools": [UNNAMED]}, 400, UNNAMED_PATH, None),
        ("POST", "/tokenize", {"prompt": "x", "model": "a"}, 404, "model", "model_not_found"),
        ("POST", "/detokenize", {"tokens": [65], "model": "a"}, 404, "model", "model_not_found"),
        ("POST", "/detokenize", {"tokens": [TOK.vocab_size]}, 400, "tokens", None),
        ("POST", "/detokenize", {"tokens": [-1]}, 400, "tokens[0]", None),
        ("POST", "/detokenize", {}, 400, "tokens", None),
    ],
)
def test_refusals(
    url: str, method: str, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    response = get(f"{url}{path}") if method == "GET" else post(f"{url}{path}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert param is None or error["param"] == param
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/v1/completions", "GET /v1/completions is not allowed: POST."),
        ("POST", "/v1/embeddings", "POST /v1/embeddings does not exist on this server: "),
    ],
)
def test_what_is_not_served_is_named(url: str, method: str, path: str, message: str) -> None:
    response = get(f"{url}{path}") if method == "GET" else post(f"{url}{path}", json={})
    assert response.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "AB"}, [TOK.bos, 65, 66]),
        ({"prompt": "AB", "add_special_tokens": True}, [TOK.bos, 65, 66]),
        ({"prompt": "AB", "add_special_tokens": None, "model": "org/tiny"}, [TOK.bos, 65, 66]),
        ({"prompt": "AB", "add_special_tokens": False}, [65, 66]),
        ({"prompt": ""}, [TOK.bos]),
    ],
)
def test_token_ids_of_a_text(url: str, body: dict[str, Any], tokens: list[int]) -> None:
    want = {"count": len(tokens), "max_model_len": 256, "tokens": tokens}
    assert post(f"{url}/tokenize", json=body).json() == want
    text = post(f"{url}/detokenize", json={"tokens": [*tokens, TOK.vocab_size - 1]}).json()
    assert text["prompt"] == TOK.decode([*tokens, TOK.vocab_size - 1])


def test_token_ids_of_a_prompt_are_those_of_its_answer(url: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    prefill = [*USER, {"role": "assistant", "content": "Well"}]
    for fields in (
        {"messages": USER},
        {"messages": USER, "tools": tools},
        {"messages": USER, "add_generation_prompt": False},
        {"messages": prefill, "continue_final_message": True},
    ):
        answer = {**fields, "max_tokens": 1, "return_token_ids": True}
        ids = post(f"{url}/v1/chat/completions", json=answer).json()["prompt_token_ids"]
        assert post(f"{url}/tokenize", json=fields).json()["tokens"] == ids
    body = {"prompt": "A\u00e9", "return_token_strs": True}
    texts = ["<|bos|>", "A", "bytes:\\xc3", "bytes:\\xa9"]
    assert post(f"{url}/tokenize", json=body).json()["token_strs"] == texts


def test_pages_of_other_origins_read_these_headers(url: str) -> None:
    headers = get(f"{url}/health", headers={"origin": ORIGIN}).headers
    names = {name.strip() for name in headers["access-control-expose-headers"].split(",")}
    assert names == {"x-request-id", "x-checkpoint", "retry-after"}


def test_the_page_is_not_framed_guessed_or_cached(url: str) -> None:
    headers = get(url).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"]
