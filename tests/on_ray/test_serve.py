"""A tiny real model in S3, on a real Ray Serve with two engines and two ingresses, and the
official client."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from ray import serve

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.config import to_json
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.serve.connection import ACCEPTED, Connection
from nanochat_ray.on_ray.serve.deployment import build, build_application, settings
from nanochat_ray.on_ray.serve.replica import EngineReplica
from nanochat_ray.on_ray.serve.routing import MAX_LEAD, PrefixRouter
from nanochat_ray.serve import keys
from nanochat_ray.serve.keys import hash_key
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from tests.tiny import hold_up_grammars, wait_for

pytestmark = pytest.mark.ray

TOK = Tokenizer.bytes_only()
KEY = "test-key-of-the-deployment"
USER = [{"role": "user", "content": "hello"}]
LONG = {"max_tokens": 900, "seed": 7, "extra_body": {"ignore_eos": True}}


def write_checkpoint(root: Store, seed: int) -> None:
    config = ModelConfig.modern(
        vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, sequence_len=1024
    )
    model = GPT(config)
    # Larger than a fresh model's, so that what it says depends on all that was said before.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(seed))
    checkpoint.save(
        root.child("runs", "tiny"),
        100 + seed,
        model_config=config,
        weights=model.state_dict(),
        optimizer=None,
        trainer={"step": 100 + seed},
        tokenizer=TOK,
    )


@pytest.fixture(scope="module")
def config(s3: str) -> ServeConfig:
    root = Store.at(s3).child("serve")
    write_checkpoint(root, 0)
    TOK.save(root.child("tokenizers", TOK.fingerprint[:16]))
    return ServeConfig(
        storage=root.uri,
        run="tiny",
        num_replicas=2,
        max_replicas=3,
        upscale_delay_s=0,
        downscale_delay_s=1,
        num_ingress_replicas=2,
        cpus=0.5,
        key_hashes=(hash_key(KEY),),
        engine=EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, max_queue_size=16),
    )


@pytest.fixture(scope="module")
def url(ray_session: None, config: ServeConfig) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(settings(config)), name="tiny", route_prefix="/")
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: len(engines(url)) == 2, 60)
    yield url
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


def test_health_keeps_the_secret(url: str) -> None:
    assert "secret" not in httpx.get(f"{url}/health", timeout=10).text


def engines(url: str) -> list[dict[str, Any]]:
    response = httpx.get(f"{url}/health", timeout=10)
    return response.json().get("engines", [])


def running(url: str) -> int:
    return sum(engine["requests"] for engine in engines(url))


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


def test_leaving_frees_the_slot(url: str) -> None:
    wait_for(lambda: running(url) == 0)
    body = json.dumps({"messages": USER, "stream": True, "ignore_eos": True}).encode()
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200 OK" in connection.recv(65536)
    wait_for(lambda: running(url) == 0, 20)


def test_a_killed_engine_is_not_noticed_by_those_who_wait(client: openai.OpenAI, url: str) -> None:
    def ask() -> Any:
        return client.chat.completions.create(model="tiny", messages=USER, stream=True, **LONG)

    undisturbed = "".join(c.choices[0].delta.content or "" for c in ask())
    assert len(undisturbed) > 300
    victims = [ask() for _ in range(4)]
    texts = ["".join(next(v).choices[0].delta.content or "" for _ in range(8)) for v in victims]
    killed = engine_processes()[0]
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    for i, victim in enumerate(victims):
        texts[i] += "".join(c.choices[0].delta.content or "" for c in victim)
    assert time.monotonic() - began < 60
    assert texts == [undisturbed] * 4
    wait_for(lambda: len(engines(url)) == 2 and killed not in engine_processes(), 90)


def test_engines_come_and_go_with_the_load(client: openai.OpenAI, url: str) -> None:
    """Queues call for a third engine, which leaves again; those whose answers run do not notice."""

    def ask() -> str:
        chunks = client.chat.completions.create(
            model="tiny", messages=USER, stream=True, **{**LONG, "max_tokens": 300}
        )
        return "".join(c.choices[0].delta.content or "" for c in chunks)

    def ask_until(done: threading.Event) -> set[str]:
        return {ask() for _ in iter(done.is_set, True)}

    undisturbed = ask()
    for askers, expected in ((32, 3), (2, 2)):
        done = threading.Event()
        with ThreadPoolExecutor(askers) as pool:
            texts = [pool.submit(ask_until, done) for _ in range(askers)]
            try:
                wait_for(lambda n=expected: len(engines(url)) == n, 90)
            finally:
                done.set()
        assert set().union(*(found.result() for found in texts)) == {undisturbed}


def engine_processes() -> list[int]:
    """Process ids of the engine replicas, which Ray names after their deployment."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            line = child.cmdline()
        except psutil.Error:
            continue
        if any("ServeReplica:tiny:engine" in part for part in line):
            found.append(child.pid)
    return sorted(found)


class Unserved(EngineReplica):
    """Without Serve nobody awaits its end."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


def test_a_grammar_that_compiles_for_long_holds_up_nobody(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, may_go_on = hold_up_grammars(monkeypatch)

    async def run() -> None:
        engine = to_json(config.engine)
        replica = Unserved(config.storage, "tiny", engine, "cpu", 1, name="r", host="127.0.0.1")
        await replica.reconfigure({"checkpoint": "step-000100"})
        answers: list[Any] = []
        endpoint = await replica.endpoint()
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(lambda _, message: answers.append(message), lambda _: None),
            *endpoint["address"],
        )
        connection.send("handshake", endpoint["secret"], "i")

        def submit(name: str, grammar: dict[str, Any] | None) -> None:
            params = SamplingParams(max_tokens=3, grammar=grammar)
            connection.send("submit", Request(id=name, prompt=[65], params=params).to_wire())

        async def until(ready: Callable[[], Any]) -> None:
            async with asyncio.timeout(60):
                while not ready():
                    await asyncio.sleep(0.01)

        submit("slow", {"choice": ["yes", "no"]})
        submit("given up", {"choice": ["no"]})
        assert await asyncio.to_thread(compiling.wait, 60)
        submit("plain", None)
        await until(lambda: ["reply", "plain", ACCEPTED] in answers)
        connection.send("abort", ["given up"])
        await until(lambda: "given up" not in replica.owners)
        assert ["reply", "slow", ACCEPTED] not in answers
        may_go_on.set()
        await until(lambda: not replica.owners)
        await until(lambda: ["reply", "slow", ACCEPTED] in answers)
        assert not any(a[:2] == ["reply", "given up"] for a in answers)
        assert replica.engine is not None
        await asyncio.to_thread(replica.engine.stop)

    asyncio.run(run())


def test_a_new_checkpoint_is_swapped_in_place(config: ServeConfig) -> None:
    """What Serve does with a replica when it is deployed again, but without Serve."""
    root = Store.at(config.storage)
    write_checkpoint(root, 1)

    async def run() -> None:
        engine = to_json(config.engine)
        replica = Unserved(config.storage, "tiny", engine, "cpu", 1, name="r", host="127.0.0.1")
        await replica.reconfigure({"checkpoint": "step-000100"})
        texts: dict[str, list[int]] = {}
        ended: set[str] = set()
        answers: list[Any] = []

        def received(_: Connection, message: list[Any]) -> None:
            if message[0] == "reply" or message[0] == "draining":
                answers.append(message)
            if message[0] != "outputs":
                return
            for output in message[1]:
                texts[output["id"]] += output["tokens"]
                ended.update({output["id"]} if output.get("finish") else ())

        async def connect(secret: str) -> Connection:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(received, lambda _: answers.append("lost")),
                *(await replica.endpoint())["address"],
            )
            connection.send("handshake", secret, "i")
            return connection

        async def until(ready: Callable[[], Any]) -> None:
            async with asyncio.timeout(30):
                while not ready():
                    await asyncio.sleep(0.01)

        def submit(name: str, tokens: int) -> None:
            params = SamplingParams(max_tokens=tokens, seed=1)
            texts[name] = []
            connection.send("submit", Request(id=name, prompt=[65], params=params).to_wire())

        stranger = await connect("guess")
        stranger.send("submit", Request(id="x", prompt=[65]).to_wire())
        await until(lambda: answers == ["lost"])
        assert not replica.owners
        answers.clear()

        connection = await connect(replica.secret)
        submit("before", 200)
        await until(lambda: "before" in ended)
        assert answers == [["reply", "before", ACCEPTED]]
        # What cannot be read is refused, and the connection goes on.
        connection.send("submit", {"id": "odd\ud800", "params": {}, "prompts": [65]})
        await until(lambda: len(answers) == 2)
        _, name, reason = answers.pop()
        assert (name, "prompts" in reason, name in replica.owners) == ("odd?", True, False)
        submit("during", 200)
        await until(lambda: len(answers) == 2)
        old = replica.engine
        await replica.reconfigure({"checkpoint": "step-000101"})
        submit("after", 200)
        await until(lambda: {"during", "after"} <= ended)
        assert texts["during"] == texts["before"] != texts["after"]
        assert old is not replica.engine
        submit("after", 2000)
        await until(lambda: len(answers) == 4)
        with pytest.raises(ValueError, match="step-000999"):
            await replica.reconfigure({"checkpoint": "step-000999"})
        assert replica.checkpoint == "step-000101"  # it goes on with what it has
        connection.close()
        await until(lambda: not replica.owners)  # an ingress that dies frees its slots

        connection = await connect(replica.secret)
        ended.clear()
        submit("last", 300)
        await until(lambda: texts["last"])
        await EngineReplica.__del__(replica)  # it ends what it has
        assert "last" in ended
        assert ["draining"] in answers

    asyncio.run(run())


def test_prompts_go_where_their_beginning_is_unless_that_is_busy() -> None:
    router = PrefixRouter()
    system, other = list(range(100)), list(range(200, 300))
    router.record("a", [*system, 1])
    router.record("b", other)
    assert router.choose([*system, 7, 8], {"a": 3, "b": 1}) == "a"
    assert router.choose([*system, 7, 8], {"a": 3 + MAX_LEAD, "b": 1}) == "b"
    assert router.choose([*other, 7], {"a": 0, "b": 1}) == "b"
    assert router.choose([5], {"a": 1, "b": 0}) == "b"
    # Another scope finds nothing there.
    assert router.choose([*system, 7, 8], {"a": 1, "b": 0}, "bob") == "b"
    router.record("a", system, "bob")
    assert router.choose([*system, 7, 8], {"a": 1, "b": 0}, "bob") == "a"
    router.forget("a")
    assert router.choose(system, {"a": 1, "b": 0}) == "b"


def test_a_run_that_is_not_there_is_named(config: ServeConfig) -> None:
    with pytest.raises(ValueError, match="run='other' has no checkpoint"):
        build({**settings(config), "run": "other"})
    with pytest.raises(ValueError, match="no field 'engine_count'"):
        build({**settings(config), "engine_count": 2})
    with pytest.raises(ValueError, match="max_replicas=1 is not allowed"):
        build({**settings(config), "max_replicas": 1})


def test_keys_of_a_redeployment_count(
    url: str, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster whose workers have another environment. The last one: it changes the key."""
    monkeypatch.setenv("NANOCHAT_API_KEYS", "another key")
    hashes = tuple(hash_key(key) for key in keys.from_environment())
    redeployed = build_application(dataclasses.replace(config, key_hashes=hashes))
    serve.run(redeployed, name="tiny", route_prefix="/")

    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(f"{url}/v1/models", headers=headers, timeout=10).status_code

    wait_for(lambda: status("another key") == 200, 60)
    for key, expected in (("another key", 200), ("", 401), (KEY, 401)):
        assert [status(key) for _ in range(10)] == [expected] * 10
