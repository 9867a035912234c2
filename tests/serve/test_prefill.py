"""Answers that continue the client's last message, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import post, serving

TOK = Tokenizer.bytes_only()
PREFILL = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So "}]


@pytest.fixture(scope="module")
def engine() -> ScriptedClient:
    return ScriptedClient(TOK.encode("it is."))


@pytest.fixture(scope="module")
def url(engine: ScriptedClient) -> Iterator[str]:
    with serving(build_app(engine, TOK, "tiny", 64)) as url:
        yield url


def ask(url: str, **fields: Any) -> Any:
    body = {"messages": PREFILL, "add_generation_prompt": False, "continue_final_message": True}
    return post(f"{url}/v1/chat/completions", json={**body, **fields})


def test_the_last_message_is_continued(url: str, engine: ScriptedClient) -> None:
    assert ask(url).json()["choices"][0]["message"]["content"] == "it is."
    assert TOK.decode(engine.requests[-1].prompt).endswith("<|assistant_start|>So ")
    # The answer may take what is left, and no more than that.
    assert engine.requests[-1].params.max_tokens == 64 - len(engine.requests[-1].prompt)
    assert ask(url, max_tokens=9999).status_code == 200
    assert ask(url, max_completion_tokens=-1).status_code == 200


def test_echo_begins_with_the_last_message(url: str) -> None:
    assert ask(url, echo=True).json()["choices"][0]["message"]["content"] == "So it is."
    lines = ask(url, echo=True, stream=True).text.split("\n\n")
    chunks = [json.loads(x[6:]) for x in lines if x.startswith("data: {")]
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d.get("content", "") for d in deltas) == "So it is."
    user = ask(url, messages=PREFILL[:1], continue_final_message=False, echo=True).json()
    assert user["choices"][0]["message"]["content"] == "it is."


def test_both_ways_at_once_are_refused(url: str) -> None:
    response = ask(url, add_generation_prompt=True)
    assert response.status_code == 400
    assert "continue_final_message" in response.json()["error"]["message"]
