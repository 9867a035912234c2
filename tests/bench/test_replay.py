"""Thousands of broken requests: none may break the server, hang, or leave anything behind.

``NANOCHAT_FUZZ=10000 pytest tests/bench/test_replay.py`` sends as many; the default is small.
"""

from __future__ import annotations

import asyncio
import gc
import os

import httpx
import psutil
import pytest
import torch
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from nanochat_ray.bench import replay
from nanochat_ray.bench.mutations import Mutation, mutations
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.generation import Limits
from nanochat_ray.serve.local import LocalClient
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.serving import serving
from tests.waiting import wait_for

COUNT = int(os.environ.get("NANOCHAT_FUZZ", "400"))
TOK = Tokenizer.bytes_only()


def server() -> LocalClient:
    shape = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "sequence_len": 256}
    model = GPT(ModelConfig.modern(vocab_size=TOK.vocab_size, **shape))
    model.init_weights(torch.Generator().manual_seed(0))
    config = EngineConfig(
        max_num_seqs=8, max_num_batched_tokens=64, max_queue_size=8, prefix_cache_tokens=512
    )
    return LocalClient(Engine.from_model(model.eval(), TOK, config))


async def fuzz(url: str, count: int, seed: int) -> dict[int, int]:
    """How often each status came; a 5xx other than 503, or no answer in time, fails."""
    statuses: dict[int, int] = {}
    requests = mutations(count, seed, huge_bytes=15_000)
    gate = asyncio.Semaphore(12)
    # No bound of the client's own: its pool loses places when a call is cancelled.
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one(mutation: Mutation) -> None:
            method, raw, leaves = mutation.method, mutation.body, mutation.leaves_after_s
            path = mutation.path
            async with gate:
                call = client.request(method, path, content=raw, headers=mutation.headers)
                try:
                    response = await asyncio.wait_for(call, leaves)
                except TimeoutError:
                    if leaves is None:
                        raise
                    return
            status = response.status_code
            statuses[status] = statuses.get(status, 0) + 1
            assert status < 500 or status == 503, (path, raw[:2000], response.text)
            if status >= 400 and method != "HEAD":
                error = response.json()["error"]
                assert error["message"], raw
            elif response.headers.get("content-type", "").startswith("text/event-stream"):
                assert response.text.endswith("\n\n"), raw
                last = response.text.rstrip().split("\n")[-1]
                endings = "data: [DONE]", '"response.completed"', '"response.incomplete"'
                assert any(end in last for end in endings), (raw[:2000], last)

        await asyncio.gather(*map(one, requests))
    return statuses


@pytest.mark.slow
@pytest.mark.timeout(60 + COUNT // 10)
def test_broken_requests_break_nothing() -> None:
    local = server()
    process = psutil.Process()
    limits = Limits(max_body_bytes=20_000, max_choices=8)
    with serving(build_app(local, TOK, "tiny", local.max_model_len, limits=limits)) as url:
        statuses = asyncio.run(fuzz(url, COUNT // 2, 1))
        # The same again needs no more memory: caches and pools are filled.
        asyncio.run(fuzz(url, COUNT // 4, 2))
        gc.collect()
        before = process.memory_info().rss
        for status, count in asyncio.run(fuzz(url, COUNT // 4, 2)).items():
            statuses[status] = statuses.get(status, 0) + count
        gc.collect()
        assert process.memory_info().rss - before < (64 << 20)
        wait_for(lambda: not local.engine.has_work)
        assert not local._streams
        assert httpx.get(f"{url}/health").status_code == 200
    local.close()
    local.engine.check_integrity()
    print(dict(sorted(statuses.items())))
    assert statuses[200] > COUNT // 25
    assert statuses[400] > COUNT // 5


@pytest.mark.slow
def test_steady_streams_outlive_broken_requests() -> None:
    local = server()
    with serving(build_app(local, TOK, "tiny", local.max_model_len)) as url:
        # How long a gap is depends on the machine: ``nanochat-ray bench replay`` measures it.
        args = replay.Args(url=url, count=150, streams=2, stream_tokens=150, max_gap_s=60.0)
        report = replay.replay(args)
    local.close()
    local.engine.check_integrity()
    assert not report.failures
    assert report.streams >= 2
    assert len(report.gaps_s) > 150
    assert sum(report.statuses.values()) > 100


def test_a_broken_server_is_reported() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        status = 200 if scope["path"] == "/v1/chat/completions" else 500
        await PlainTextResponse("no", status)(scope, receive, send)

    with serving(broken) as url:
        report = replay.replay(replay.Args(url=url, count=20, streams=1, huge_bytes=0))
    assert any("a steady stream ended with 500" in line for line in report.failures)
    assert any("/v1/completions" in line and " 500 " in line for line in report.failures)
