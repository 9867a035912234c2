"""A tiny real model in S3, on a real Ray Serve with two engines and two ingresses, and the
official client."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.engine.request import SamplingParams
from nanochat_ray.evals.answers import make_requests
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.evals import open_fleets
from nanochat_ray.on_ray.fleet import num_replicas
from nanochat_ray.on_ray.serve.deployment import build_application
from nanochat_ray.rl.rollout import sample_rollouts
from nanochat_ray.serve import keys
from nanochat_ray.serve.keys import hash_key
from nanochat_ray.storage import Store
from tests.on_ray.serve.tiny_run import KEY, engines
from tests.rl.tiny_rl import ENGINE, save_parent
from tests.tiny import TOKENIZER
from tests.waiting import wait_for

pytestmark = pytest.mark.ray

USER = [{"role": "user", "content": "hello"}]
LONG = {"max_tokens": 900, "seed": 7, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=240)


def test_health_keeps_the_secret(url: str) -> None:
    assert "secret" not in httpx.get(f"{url}/health", timeout=60).text


def test_client_lists_completes_chats_and_streams(client: openai.OpenAI, url: str) -> None:
    assert [m.id for m in client.models.list().data] == ["tiny"]
    one = client.completions.create(model="tiny", prompt="x", max_tokens=8, seed=1)
    assert one.usage is not None
    assert one.usage.prompt_tokens == 2
    whole = client.chat.completions.create(model="tiny", messages=USER, max_tokens=40, seed=3)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=USER, max_tokens=40, seed=3, stream=True
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert "<textarea" in httpx.get(url).text
    with_key = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert httpx.post(f"{url}/v1/completions", content=b"{", headers=with_key).status_code == 400
    # The key came with the deployment: no process of this Ray has it in its environment.
    assert "NANOCHAT_API_KEYS" not in os.environ
    assert httpx.post(f"{url}/v1/completions", content=b"{").status_code == 401


def test_unknown_model_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=USER)
    assert caught.value.code == "model_not_found"


def test_a_disconnect_frees_the_sequence(url: str) -> None:
    fields = {"messages": USER, "stream": True, "max_tokens": 900, "ignore_eos": True, "n": 8}
    body = json.dumps(fields).encode()
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"

    def tokens_when_idle(least: int) -> int:
        """Of both engines since their start, in one look at both."""
        result = 0

        def is_idle() -> bool:
            nonlocal result
            both = engines(url)
            result = sum(engine["generated_tokens"] for engine in both)
            return [engine["requests"] for engine in both] == [0, 0] and result >= least

        wait_for(is_idle, 120, "idle engines")
        return result

    def has_ended_early() -> bool:
        before = tokens_when_idle(0)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            assert b"200 OK" in connection.recv(65536)
        return tokens_when_idle(before + 1) < before + 8 * 900

    # Once is enough: a busy machine may notice that the client is gone when all is complete.
    wait_for(has_ended_early, 120, "the end of its sequences")


def test_streams_survive_a_killed_replica(client: openai.OpenAI, url: str) -> None:
    def ask() -> Any:
        return client.chat.completions.create(model="tiny", messages=USER, stream=True, **LONG)

    reference = "".join(c.choices[0].delta.content or "" for c in ask())
    assert len(reference) > 300
    streams = [ask() for _ in range(4)]
    texts = ["".join(next(s).choices[0].delta.content or "" for _ in range(8)) for s in streams]
    victim = engine_processes()[0]
    os.kill(victim, signal.SIGKILL)
    for i, stream in enumerate(streams):
        texts[i] += "".join(c.choices[0].delta.content or "" for c in stream)
    assert texts == [reference] * 4
    wait_for(
        lambda: len(engines(url)) == 2 and victim not in engine_processes(), 180, "another engine"
    )


def test_replicas_follow_the_load(client: openai.OpenAI, url: str) -> None:
    """Full queues start a third replica, which stops again; every completion stays the same."""

    def ask() -> str:
        chunks = client.chat.completions.create(
            model="tiny", messages=USER, stream=True, **{**LONG, "max_tokens": 300}
        )
        return "".join(c.choices[0].delta.content or "" for c in chunks)

    def ask_at_once() -> str:
        # Engines that are faster than a client reads streams would have no queues.
        body = {**LONG, "max_tokens": 600}
        answer = client.chat.completions.create(model="tiny", messages=USER, **body)
        return answer.choices[0].message.content or ""

    def ask_until(stop: threading.Event, ask: Callable[[], str]) -> set[str]:
        return {ask() for _ in iter(stop.is_set, True)}

    for num_clients, size, work in ((32, 3, ask_at_once), (2, 2, ask)):
        reference, stop = work(), threading.Event()
        with ThreadPoolExecutor(num_clients) as pool:
            texts = [pool.submit(ask_until, stop, work) for _ in range(num_clients)]
            try:
                wait_for(lambda n=size: len(engines(url)) == n, 180, f"{size} engines")
            finally:
                stop.set()
        assert set().union(*(text.result() for text in texts)) == {reference}


def test_rollouts_run_beside_streams(client: openai.OpenAI, url: str, root: Store) -> None:
    save_parent(root)  # of another shape than the model that is served
    run = root.child("runs", "chat")
    model, _ = checkpoint.load_model(run)
    local = LocalEngine.from_model(model, TOKENIZER, ENGINE)
    params = SamplingParams(max_tokens=12, logprobs=0)
    requests = make_requests([1, 2], range(64), params, "r")

    def ask() -> Iterator[str]:
        chunks = client.chat.completions.create(model="tiny", messages=USER, stream=True, **LONG)
        return (chunk.choices[0].delta.content or "" for chunk in chunks)

    reference, streams = "".join(ask()), [ask() for _ in range(4)]
    texts = [next(stream) for stream in streams]
    with open_fleets(run, engines=0, endpoint="tiny") as make_fleet:
        for version in (0, 1):
            local.load(version, model.state_dict())
            fleet = make_fleet(model, TOKENIZER, ENGINE)
            assert fleet.device_type == "cpu"
            assert sample_rollouts(fleet, requests) == sample_rollouts(local, requests)
            for weight in model.state_dict().values():
                weight.mul_(1.01)
    assert [text + "".join(rest) for text, rest in zip(texts, streams, strict=True)] == 4 * [
        reference
    ]
    with pytest.raises(ValueError, match=r"endpoint='nobody' is no Serve .*tiny"):
        num_replicas("nobody")


def engine_processes() -> list[int]:
    """Process ids of the engine replicas, which Ray names after their deployment."""
    import psutil

    pids = []
    for child in psutil.Process().children(recursive=True):
        try:
            line = child.cmdline()
        except psutil.Error:
            continue
        if any("ServeReplica:tiny:engine" in part for part in line):
            pids.append(child.pid)
    return sorted(pids)


def test_keys_of_a_redeployment_count(
    url: str, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster whose workers have another environment. The last one: it changes the key."""
    monkeypatch.setenv("NANOCHAT_API_KEYS", "another key")
    hashes = tuple(hash_key(key) for key in keys.from_environment())
    application = build_application(dataclasses.replace(config, key_hashes=hashes))
    serve.run(application, name="tiny", route_prefix="/")

    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            return httpx.get(f"{url}/v1/models", headers=headers, timeout=60).status_code
        except httpx.TransportError:
            return 0

    # Of every ingress; one that ends may answer for a moment more.
    for key, code in (("another key", 200), ("", 401), (KEY, 401)):
        wait_for(lambda k=key, c=code: {status(k) for _ in range(10)} == {c}, 120, f"{code}s")
