"""Thousands of broken requests: none may break the server, hang, or leave anything behind.

``NANOCHAT_FUZZ=10000 pytest tests/serve/test_fuzz.py`` sends as many; the default is small.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
import random
from typing import Any

import httpx
import psutil
import pytest
import torch
from serving import serving
from tiny import wait_for

from nanochat_ray.config import EngineConfig, ModelConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.tools import calculator_tool
from nanochat_ray.model.gpt import GPT
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.local import LocalClient
from nanochat_ray.serve.service import Limits
from nanochat_ray.text.tokenizer import Tokenizer

COUNT = int(os.environ.get("NANOCHAT_FUZZ", "400"))
TOK = Tokenizer.bytes_only()
TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SAMPLING = {
    "model": "tiny",
    "max_tokens": 5,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "n": 2,
    "stop": ["x", "yz"],
    "stop_token_ids": [7],
    "min_tokens": 1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"65": 5},
    "ignore_eos": True,
    "stream": False,
}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {**SAMPLING, "prompt": "hello", "echo": True}),
    ("/v1/completions", {**SAMPLING, "prompt": "hello", "logprobs": 2}),
    ("/v1/completions", {**SAMPLING, "prompt": [65, 66, 67], "best_of": 2}),
    ("/v1/completions", {**SAMPLING, "prompt": ["a", "b"], "stream": True}),
    ("/v1/completions", {**SAMPLING, "prompt": [[65], [66]], "stream": True, "logprobs": 0}),
    (
        "/v1/chat/completions",
        {
            **SAMPLING,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ],
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    (
        "/v1/chat/completions",
        {
            **SAMPLING,
            "messages": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
            ],
            "tools": [TOOL],
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "json"}],
            "max_completion_tokens": 5,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA},
            },
        },
    ),
    ("/tokenize", {"model": "tiny", "prompt": "hello"}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hello"}]}),
    ("/detokenize", {"model": "tiny", "tokens": [65, 66]}),
]
DEEP: Any = 0
for _ in range(60):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 2**200, 0.5, -0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "x", "\x00", "\ud800", "é🙂", "1", "a" * 3000, "[" * 500),
    *([], {}, [None], [""], [0], [-1], [[]], {"": 0}, {"type": "text"}, {"type": None}, DEEP),
    *([65] * 600, ["x"] * 200, {"65": 1e9}, {"-1": 1}, {"99999": 1}, "auto", "required", "none"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    found = [path] if path else []
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, key))
    return found


def mutate(rng: random.Random, body: dict[str, Any]) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        where = places(body)
        if not where:
            break
        *path, key = rng.choice(where)
        holder: Any = body
        for step in path:
            holder = holder[step]
        kind = rng.random()
        if kind < 0.15:
            del holder[key]
        elif kind < 0.25 and isinstance(holder, list):
            holder += [copy.deepcopy(holder[key])] * rng.randint(1, 9)
        elif kind < 0.3 and isinstance(holder, dict):
            holder[rng.choice(["suffix", "echo", "functions", "priority", "", "🙂"])] = holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    raw = json.dumps(body).encode()
    if rng.random() < 0.1:
        raw = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            kind = rng.random()
            if kind < 0.4:
                raw[at] = rng.randrange(256)
            elif kind < 0.7:
                del raw[at:]
                raw += b"{"
            else:
                raw[at:at] = rng.choice([b"\xff\xfe", b"[" * 2000, b"1e999", b"\x00", b"NaN"])
    return bytes(raw)


def server() -> LocalClient:
    shape = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "sequence_len": 256}
    model = GPT(ModelConfig.modern(vocab_size=TOK.vocab_size, **shape))
    model.init_weights(torch.Generator().manual_seed(0))
    config = EngineConfig(max_slots=8, token_budget=64, max_waiting=8, prefix_tokens=512)
    return LocalClient(Engine(model.eval(), config, calculator_tool(TOK), TOK.byte_table()))


async def fuzz(url: str, count: int, seed: int) -> dict[int, int]:
    """How often each status came; a 5xx other than 503, or no answer in time, fails."""
    rng = random.Random(seed)
    seen: dict[int, int] = {}
    jobs = []
    for _ in range(count):
        path, body = rng.choice(SEEDS)
        leaves = rng.uniform(0, 0.05) if rng.random() < 0.1 else None
        kind = rng.choice(["application/json"] * 12 + ["text/plain", "", "application/x-json"])
        method = rng.choice(["POST"] * 25 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
        jobs.append((path, mutate(rng, body), leaves, kind, method))
    gate = asyncio.Semaphore(12)
    # No bound of the client's own: its pool loses places when a call is cancelled.
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:

        async def one(path: str, raw: bytes, leaves: float | None, kind: str, method: str) -> None:
            headers = {"content-type": kind} if kind else {}
            async with gate:
                call = client.request(method, path, content=raw, headers=headers)
                try:
                    response = await asyncio.wait_for(call, leaves)
                except TimeoutError:
                    if leaves is None:
                        raise
                    return
            status = response.status_code
            seen[status] = seen.get(status, 0) + 1
            assert status < 500 or status == 503, (path, raw[:2000], response.text)
            if status >= 400 and method != "HEAD":
                error = response.json()["error"]
                assert error["message"], raw
            elif response.headers.get("content-type", "").startswith("text/event-stream"):
                assert response.text.endswith("\n\n"), raw
                last = response.text.rstrip().split("\n")[-1]
                assert last == "data: [DONE]", (raw[:2000], last)

        await asyncio.gather(*(one(*job) for job in jobs))
    return seen


@pytest.mark.timeout(60 + COUNT // 10)
def test_broken_requests_break_nothing() -> None:
    local = server()
    process = psutil.Process()
    limits = Limits(max_body_bytes=20_000, max_choices=8)
    with serving(build_app(local, TOK, "tiny", local.max_len, limits=limits)) as url:
        seen = asyncio.run(fuzz(url, COUNT // 2, 1))
        gc.collect()
        before = process.memory_info().rss
        for status, count in asyncio.run(fuzz(url, COUNT - COUNT // 2, 2)).items():
            seen[status] = seen.get(status, 0) + count
        gc.collect()
        assert process.memory_info().rss - before < (64 << 20)
        wait_for(lambda: not local.engine.has_work)
        assert not local._streams
        assert httpx.get(f"{url}/health").status_code == 200
    local.close()
    local.engine.check_integrity()
    print(dict(sorted(seen.items())))
    assert seen[200] > COUNT // 20
    assert seen[400] > COUNT // 4
