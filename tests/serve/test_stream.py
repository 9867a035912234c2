"""How an answer is sent, without a server: its statuses, its events, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from nanochat_ray.engine.request import EngineFull
from nanochat_ray.serve.client import UnavailableError
from nanochat_ray.serve.generation import Limits
from nanochat_ray.serve.metrics import PrometheusSink, RequestMetrics
from nanochat_ray.serve.openai.chat import ChatBuilder, parse_chat
from nanochat_ray.serve.openai.errors import ApiError
from nanochat_ray.serve.openai.schema.requests import ChatRequest
from nanochat_ray.serve.openai.stream import respond
from nanochat_ray.serve.serving import Serving
from nanochat_ray.serve.sse import EventStream
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient

TOK = Tokenizer.bytes_only()


async def answer(
    engine: ScriptedClient, leaves: bool = False, sink: PrometheusSink | None = None, **fields: Any
) -> Response:
    """The response to a chat, whose client leaves at once or never."""
    metrics = RequestMetrics(sink or PrometheusSink("tiny"))
    serving = Serving(engine, TOK, "tiny", 64, Limits(), metrics)
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})
    builder = ChatBuilder(serving, await parse_chat(serving, body), "chatcmpl-1")

    async def receive() -> Message:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    return await respond(builder, HttpRequest({"type": "http", "headers": []}, receive))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_left_is_logged_as_499(stream: bool) -> None:
    engine = ScriptedClient(TOK.encode("abc"), delay=60)
    response = asyncio.run(answer(engine, leaves=True, stream=stream))
    assert response.status_code == 499
    assert len(engine.aborts) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("refusal", "status", "retry_after", "code"),
    [
        (EngineFull("full", 7.2), 429, 8, "queue_full"),
        (UnavailableError("none"), 503, 2, "engine_unavailable"),
        (ValueError("top_k=-1 is not allowed"), 400, None, None),
        ("deadline: over", 504, None, "request_timeout"),
        ("grammar: too large", 400, None, None),
        ("logits: not finite", 500, None, "engine_failed"),
        ("max_queue_size=1", 429, 1, "queue_full"),
        ("weights: replaced", 503, 2, "engine_unavailable"),
    ],
)
def test_each_failure_has_its_status(
    stream: bool, refusal: Any, status: int, retry_after: int | None, code: str | None
) -> None:
    engine = ScriptedClient([], finish="error")
    if isinstance(refusal, str):
        engine.error = refusal
    else:
        engine.refuse = refusal
    fields = {"guided_regex": "a+"} if "grammar" in str(refusal) else {}
    sink = PrometheusSink("tiny")
    with pytest.raises(ApiError) as failure:
        asyncio.run(answer(engine, sink=sink, stream=stream, **fields))
    error = failure.value
    assert (error.status, error.retry_after, error.code) == (status, retry_after, code)
    params = {"top_k=-1 is not allowed": "top_k", "grammar: too large": "guided_regex"}
    assert error.param == params.get(str(refusal))
    # Of requests that are right, each is counted once.
    counts = re.findall(rb'_refusals_total\{.*status="(\d+)"\} (.+)', sink.text())
    assert {int(key): float(count) for key, count in counts} == {
        key: float(key == status) for key in (429, 500, 503, 504)
    }


def test_a_stream_that_is_closed_aborts_at_once() -> None:
    async def run() -> int:
        engine = ScriptedClient(TOK.encode("abc"), finish=None)
        response = await answer(engine, stream=True)
        assert isinstance(response, EventStream)
        await anext(response.events)
        assert not engine.aborts
        await response.events.aclose()
        return len(engine.aborts)

    assert asyncio.run(run()) == 1


@pytest.mark.parametrize("leaves", [True, False])
def test_a_response_ends_with_its_events(leaves: bool) -> None:
    """The generator has ended when the response has, also if the client takes no more."""
    calls: list[str] = []

    async def events() -> AsyncGenerator[str, None]:
        try:
            yield "data: 1\n\n"
            yield "data: 2\n\n"
        finally:
            calls.append("closed")

    async def run() -> None:
        full = asyncio.Event()

        async def send(message: Message) -> None:
            calls.append(message.get("body", b"start").decode().strip())
            if leaves and "body" in message:
                full.set()  # its client reads no more
                await asyncio.Event().wait()

        async def receive() -> Message:
            await full.wait()
            return {"type": "http.disconnect"}

        await EventStream(events(), {})({"type": "http"}, receive, send)
        others = ["closed"] if leaves else ["data: 2", "closed", ""]
        assert calls == ["start", "data: 1", *others]

    asyncio.run(run())


def test_a_whole_answer() -> None:
    response = asyncio.run(answer(ScriptedClient(TOK.encode("abc"))))
    assert isinstance(response, JSONResponse)
    assert response.headers["x-checkpoint"] == "step-000100-0a1b2c3d"
    body = json.loads(bytes(response.body))
    assert body["choices"][0]["message"]["content"] == "abc"
    assert body["system_fingerprint"] == "step-000100-0a1b2c3d"
    assert body["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("break_after", [None, 2])
def test_a_streamed_answer(break_after: int | None) -> None:
    """An engine that is lost after the first token is an event, and the last one."""

    async def events() -> tuple[Response, list[str]]:
        engine = ScriptedClient(TOK.encode("aéb"))
        engine.break_after = break_after
        response = await answer(engine, stream=True)
        assert isinstance(response, EventStream)
        text = "".join([part async for part in response.events])
        return response, text.removesuffix("\n\n").split("\n\n")

    response, lines = asyncio.run(events())
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-checkpoint"] == "step-000100-0a1b2c3d"
    *chunks, last = (line.removeprefix("data: ") for line in lines)
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    contents = [delta.get("content") for delta in deltas]
    if break_after is None:
        assert (contents, last) == (["", "a", "é", "b", None], "[DONE]")
    else:
        assert contents == ["", "a"]
        assert json.loads(last)["error"]["code"] == "engine_unavailable"
