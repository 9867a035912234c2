"""An engine replica and its connections, without Serve."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_ray.checkpoint.lease import leased_checkpoints
from nanochat_ray.config import to_json
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.on_ray.serve.connection import ACCEPTED, Connection, Handshakes
from nanochat_ray.on_ray.serve.replica import EngineReplica
from nanochat_ray.storage import Store
from tests.on_ray.serve.tiny_run import LocalReplica, write_checkpoint
from tests.outage import Outage
from tests.tiny import hold_up_grammars

ENGINE = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, max_queue_size=16)


@pytest.fixture
def tiny_run(root: Store) -> Store:
    write_checkpoint(root, 0)
    return root


async def start_replica(root: Store) -> LocalReplica:
    engine = to_json(ENGINE)
    replica = LocalReplica(root.uri, "tiny", engine, "cpu", 1, name="r", host="127.0.0.1")
    await replica.reconfigure({"checkpoint": "step-000100"})
    return replica


def test_slow_grammars_delay_no_other_request(
    tiny_run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, may_go_on = hold_up_grammars(monkeypatch)

    async def run() -> None:
        replica = await start_replica(tiny_run)
        answers: list[Any] = []
        endpoint = await replica.endpoint()
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(lambda _, message: answers.append(message), lambda _: None),
            *endpoint["address"],
        )

        async def until(ready: Callable[[], Any]) -> None:
            async with asyncio.timeout(60):
                while not ready():
                    await asyncio.sleep(0.01)

        connection.send("handshake", endpoint["secret"], "i")
        await until(lambda: answers)  # before that no more than a handshake is read

        def submit(name: str, grammar: dict[str, Any] | None) -> None:
            params = SamplingParams(max_tokens=3, grammar=grammar)
            connection.send("submit", Request(id=name, prompt=[65], params=params).to_wire())

        submit("slow", {"choice": ["yes", "no"]})
        submit("aborted", {"choice": ["no"]})
        assert await asyncio.to_thread(compiling.wait, 60)
        submit("plain", None)
        await until(lambda: ["reply", "plain", ACCEPTED] in answers)
        connection.send("abort", ["aborted"])
        await until(lambda: "aborted" not in replica.owners)
        assert ["reply", "slow", ACCEPTED] not in answers
        may_go_on.set()
        await until(lambda: not replica.owners)
        await until(lambda: ["reply", "slow", ACCEPTED] in answers)
        assert not any(a[:2] == ["reply", "aborted"] for a in answers)
        connection.close()
        await EngineReplica.__del__(replica)

    asyncio.run(run())


def test_a_request_is_aborted_where_it_runs() -> None:
    """While weights are swapped a replica may have two engines."""
    aborts: list[list[str]] = [[], []]
    old, new = (SimpleNamespace(abort=names.append) for names in aborts)
    replica: Any = SimpleNamespace(owners={"a": (None, old), "b": (None, new)})
    EngineReplica._abort(replica, ["b", "ended"])
    assert aborts == [[], ["b"]]
    assert list(replica.owners) == ["a"]


def test_requests_of_a_dead_ingress_are_aborted() -> None:
    aborts: list[str] = []
    engine, dead, other = SimpleNamespace(abort=aborts.append), object(), object()
    replica: Any = SimpleNamespace(
        owners={"a": (dead, engine), "b": (other, engine), "c": (dead, engine)},
        connections={dead, other},
        handshakes=Handshakes(),
    )
    replica._abort = functools.partial(EngineReplica._abort, replica)
    EngineReplica._on_disconnected(replica, dead)  # type: ignore[arg-type]
    assert aborts == ["a", "c"]
    assert list(replica.owners) == ["b"]
    assert replica.connections == {other}


def test_a_replaced_engine_ends_its_requests() -> None:
    ends: list[bool] = []

    async def run() -> None:
        engine: Any = SimpleNamespace(stop=lambda: ends.append(True))
        replica: Any = SimpleNamespace(owners={"a": (None, engine), "b": (None, None)})
        retirement = asyncio.ensure_future(EngineReplica._retire(replica, engine))
        await asyncio.wait([retirement], timeout=0.05)
        assert not ends
        del replica.owners["a"]
        await retirement

    asyncio.run(run())
    assert ends == [True]


def test_a_new_checkpoint_is_swapped_in_place(tiny_run: Store) -> None:
    """What Serve does with a replica when it is deployed again, but without Serve."""
    write_checkpoint(tiny_run, 1)

    async def run() -> None:
        replica = await start_replica(tiny_run)
        texts: dict[str, list[int]] = {}
        complete: set[str] = set()
        answers: list[Any] = []

        def on_message(_: Connection, message: list[Any]) -> None:
            if message[0] == "reply" or message[0] == "draining":
                answers.append(message)
            if message[0] != "outputs":
                return
            for output in message[1]:
                texts[output["id"]] += output["tokens"]
                complete.update({output["id"]} if output.get("finish") else ())

        async def connect(secret: str) -> Connection:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(on_message, lambda _: answers.append("lost")),
                *(await replica.endpoint())["address"],
            )
            connection.send("handshake", secret, "i")
            return connection

        async def until(ready: Callable[[], Any]) -> None:
            async with asyncio.timeout(60):
                while not ready():
                    await asyncio.sleep(0.01)

        def submit(name: str, tokens: int) -> None:
            params = SamplingParams(max_tokens=tokens, seed=1)
            texts[name] = []
            connection.send("submit", Request(id=name, prompt=[65], params=params).to_wire())

        stranger = await connect("wrong secret")
        stranger.send("submit", Request(id="x", prompt=[65]).to_wire())
        await until(lambda: answers == ["lost"])
        assert not replica.owners
        answers.clear()

        connection = await connect(replica.secret)
        submit("before", 200)
        await until(lambda: "before" in complete)
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
        await until(lambda: {"during", "after"} <= complete)
        assert texts["during"] == texts["before"] != texts["after"]
        assert old is replica.engine
        submit("after", 2000)
        await until(lambda: len(answers) == 4)
        await replica.reconfigure({"checkpoint": "step-000999"})
        assert replica.checkpoint == "step-000101"  # it goes on with what it has
        connection.close()
        await until(lambda: not replica.owners)  # an ingress that dies frees its slots

        connection = await connect(replica.secret)
        complete.clear()
        submit("last", 300)
        await until(lambda: texts["last"])
        await EngineReplica.__del__(replica)  # it ends what it has
        await until(lambda: "last" in complete and ["draining"] in answers)

    asyncio.run(run())


def test_a_bad_deployment_leaves_the_old_weights(tiny_run: Store) -> None:
    """An error would make Serve end the replica, and every other one."""

    async def run() -> None:
        replica = await start_replica(tiny_run)
        write_checkpoint(tiny_run, 1)
        tiny_run.child("runs", "tiny", "step-000101").write_bytes("weights.msgpack", b"")
        await replica.reconfigure({"checkpoint": "step-000101"})
        assert replica.status()["checkpoint"] == "step-000100"
        assert "weights.msgpack is damaged" in replica.status()["refused"]["step-000101"]
        assert leased_checkpoints(replica.run) == {"step-000100"}
        await replica.check_health()
        write_checkpoint(tiny_run, 1)
        await replica.reconfigure({"checkpoint": "step-000101"})
        assert replica.status()["checkpoint"] == "step-000101"
        assert not replica.status()["refused"]
        assert leased_checkpoints(replica.run) == {"step-000101"}
        await EngineReplica.__del__(replica)

    asyncio.run(run())


def test_weights_that_fail_to_load_are_replaced_by_the_old(
    tiny_run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, for example, when a part of them has been replaced."""
    load_weights, failures = Engine.load_weights, [RuntimeError("out of memory")]

    def failing_load(engine: Engine, *args: Any) -> None:
        load_weights(engine, *args)
        if failures:
            raise failures.pop()

    async def run() -> None:
        replica = await start_replica(tiny_run)
        assert replica.engine is not None
        version = replica.engine.weight_version
        write_checkpoint(tiny_run, 1)
        monkeypatch.setattr(Engine, "load_weights", failing_load)
        await replica.reconfigure({"checkpoint": "step-000101"})
        assert replica.status()["refused"] == {"step-000101": "out of memory"}
        assert replica.status()["checkpoint"] == "step-000100"
        assert replica.engine.weight_version == version
        await EngineReplica.__del__(replica)

    asyncio.run(run())


def test_a_deployment_waits_for_storage(tiny_run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve would not deploy it again."""
    outage = Outage(monkeypatch)
    outage.most_failures = 2

    async def run() -> None:
        replica = await start_replica(tiny_run)
        write_checkpoint(tiny_run, 1)
        outage.is_on = True
        await replica.reconfigure({"checkpoint": "step-000101"})
        assert replica.status()["checkpoint"] == "step-000101"
        assert not replica.status()["refused"]
        await EngineReplica.__del__(replica)

    asyncio.run(run())
    assert outage.num_failures == 2


def test_a_replica_starts_when_storage_is_back(
    tiny_run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = Outage(monkeypatch)
    outage.is_on, outage.most_failures = True, 3

    async def run() -> None:
        replica = await start_replica(tiny_run)
        assert replica.status()["checkpoint"] == "step-000100"
        await EngineReplica.__del__(replica)

    asyncio.run(run())
    assert outage.num_failures == 3


def test_health_is_that_of_the_engine(tiny_run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        replica = await start_replica(tiny_run)
        await replica.check_health()
        engine = replica.engine
        assert engine is not None
        stats = engine.stats()
        assert replica.record_autoscaling_stats() == {
            name: getattr(stats, name) for name in ("running", "waiting", "slots", "kv_cache_usage")
        }
        limits: list[float] = []
        with monkeypatch.context() as patch:
            patch.setattr(engine, "is_hung", lambda limit_s: not limits.append(limit_s))
            with pytest.raises(RuntimeError, match="a step of the engine hangs"):
                await replica.check_health()
            assert (await replica.endpoint())["address"] is None
        assert set(limits) == {10.0}
        tasks = list(replica._tasks)
        await EngineReplica.__del__(replica)
        assert not engine._thread.is_alive()
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError]  # the heartbeats
        assert not replica.run.list("leases")
        replica.engine = None
        assert replica.record_autoscaling_stats() == {}
        with pytest.raises(RuntimeError, match="the engine is dead: not started"):
            await replica.check_health()

    asyncio.run(run())


def test_strangers_cannot_use_up_connections(root: Store) -> None:
    """Connections that never send the secret are bounded in number and in time."""

    async def run() -> None:
        replica = LocalReplica(root.uri, "chat", {}, "cpu", 1, name="r", host="127.0.0.1")
        replica.handshakes = Handshakes(most=8, seconds=1.0)
        await replica.listen()
        assert replica.server is not None
        address = tuple((await replica.endpoint())["address"])
        strangers = [socket.create_connection(address) for _ in range(40)]
        messages: list[Any] = []
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(
                lambda _, message: messages.append(message[0]), lambda _: messages.append("lost")
            ),
            *address,
        )
        connection.send("handshake", replica.secret, "i")
        async with asyncio.timeout(60):
            while "handshake" not in messages:
                await asyncio.sleep(0.01)
            assert len(replica.handshakes) <= 8
            while len(replica.handshakes):
                await asyncio.sleep(0.01)
        for stranger in strangers:
            stranger.settimeout(60)
            assert await asyncio.to_thread(stranger.recv, 1) == b""
            stranger.close()
        assert "lost" not in messages  # the right one stays
        assert len(replica.connections) == 1
        connection.close()
        replica.server.close()
        for task in replica._tasks:
            task.cancel()

    asyncio.run(run())
