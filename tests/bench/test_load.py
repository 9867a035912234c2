"""The load client: what it counts, and that it reads a stream however that is cut."""

from __future__ import annotations

import asyncio
import contextlib
from unittest.mock import AsyncMock

import pytest

from nanochat_ray.bench import load
from nanochat_ray.bench.http_stream import Response, Result
from nanochat_ray.bench.load import (
    Prompt,
    drive,
    percentile,
    random_prompts,
    shared_prefix_prompts,
    summary,
)
from nanochat_ray.bench.long_prompt import long_prompt_delay
from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient, full
from tests.serve.serving import serving

TOK = Tokenizer.bytes_only()


def test_streams_are_measured() -> None:
    engine = ScriptedClient(TOK.encode("abcdef" * 20), delay=0.01)
    prompts = random_prompts(6, vocab=256, prompt=10, output=8, spread=0.5)
    with serving(build_app(engine, TOK, "tiny", 256)) as url:
        results, seconds = asyncio.run(drive(url, "tiny", prompts, concurrency=3, rate=100))
        assert [r.tokens for r in results] == [p.output for p in prompts]
        assert [r.prompt_tokens for r in results] == [len(p.ids) for p in prompts]
        figures = summary(results, seconds, {"ttft": 1000, "e2e": 0})
        assert (figures["failed"], figures["goodput_per_s"]) == (0, 0)
        for result in results:
            # A busy machine may be late, and not early.
            assert 0.99 * engine.delay < result.first_s
            assert 0.99 * engine.delay * result.tokens < result.total_s <= seconds
            assert result.first_s + sum(result.gaps_s) <= result.total_s + 1e-6
        engine.refuse = full()
        (rejection,), _ = asyncio.run(drive(url, "tiny", prompts[:1], concurrency=1))
        assert "429" in rejection.error


def test_figures_by_hand() -> None:
    results = [
        Result(0.0, first_s=0.5, gaps_s=[0.25, 0.75], total_s=1.5, prompt_tokens=4, tokens=3),
        Result(1.0, first_s=1.5, gaps_s=[0.5], total_s=2.0, prompt_tokens=6, tokens=2),
        Result(1.0, error="status 503"),
    ]
    figures = summary(results, 4.0, {"ttft": 1000})
    assert (figures["requests"], figures["failed"], figures["requests_per_s"]) == (3, 1, 0.5)
    assert (figures["tokens_per_s"], figures["all_tokens_per_s"]) == (1.25, 3.75)
    assert (figures["ttft_mean_ms"], figures["ttft_p50_ms"]) == (1000, 1000)
    assert [figures[f"{name}_p50_ms"] for name in ("tpot", "itl", "e2e")] == [500, 500, 1750]
    assert figures["goodput_per_s"] == 0.25


def test_the_wait_for_a_long_prompt_is_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # The gaps of the first 40 tokens are those of the streams' own prompts.
    result = Result(0.0, gaps_s=[9.0] * 40 + [0.25] * 10 + [1.0])

    async def drive_one(*_: object, **__: object) -> tuple[list[Result], float]:
        return [result], 1.0

    with monkeypatch.context() as patch:
        patch.setattr(load, "drive", drive_one)
        patch.setattr(load, "complete", AsyncMock(return_value=Result(0.0)))
        assert asyncio.run(long_prompt_delay("", "tiny", vocab=256)) == 3.0
    engine = ScriptedClient(TOK.encode("abcdef" * 40), delay=0.001)
    with serving(build_app(engine, TOK, "tiny", 512)) as url:
        assert asyncio.run(long_prompt_delay(url, "tiny", vocab=256, streams=4, length=200)) > 0
        assert [len(request.prompt) for request in engine.requests].count(200) == 1
        engine.refuse = full()
        with pytest.raises(ValueError, match="429"):
            asyncio.run(long_prompt_delay(url, "tiny", vocab=256, streams=1, length=20))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_in_pieces(size: int) -> None:
    event = b'data: {"choices": [{"text": "ab"}]}\n\n'
    frames = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (event[:9], event[9:], event))
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + frames + b"0\r\n\r\n"
    result = Result(0.0)
    response = Response(result)
    for at in range(0, len(raw), size):
        assert not response.is_over
        response.feed(raw[at : at + size], 1.0)
    assert response.is_over
    assert result.text == "abab"
    assert len(result.gaps_s) == 1


@pytest.mark.parametrize("size", [1, 1000])
def test_a_refusal_ends_with_its_body(size: int) -> None:
    raw = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 4\r\n\r\nbusy"
    response = Response(Result(0.0))
    for at in range(0, len(raw), size):
        assert not response.is_over
        response.feed(raw[at : at + size], 2.0)
    assert response.is_over
    result = response.result
    assert (result.error, result.status, result.retry_after_s) == ("status 429: busy", 429, 3)
    assert result.total_s == 2.0


def test_connections_are_kept_until_the_server_closes_them() -> None:
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        body = b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n'
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            for _ in range(2):
                await reader.readuntil(b"}}")  # of its body
                writer.write(head + body)

    async def run() -> list[Result]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        prompts = [Prompt([1], 1)] * 5
        results, _ = await drive(f"http://127.0.0.1:{port}", "tiny", prompts, concurrency=1)
        server.close()
        return results

    results = asyncio.run(run())
    assert [(r.text, r.error) for r in results] == [("a", "")] * 5
    assert num_connections == 3


def test_shared_prefix_and_percentiles() -> None:
    one, two = shared_prefix_prompts(2, vocab=50, shared_prefix=20, own=5, output=1)
    assert one.ids[:20] == two.ids[:20]
    assert one.ids[20:] != two.ids[20:]
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([0, 10], 0.9) == 9
    assert percentile([], 0.5) == 0
    assert isinstance(one, Prompt)
