"""The ingress's client against replicas that are plain TCP servers; no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_ray.engine.request import (
    WEIGHTS_REPLACED,
    EngineFull,
    Request,
    RequestOutput,
    SamplingParams,
)
from nanochat_ray.on_ray.serve import client as client_module
from nanochat_ray.on_ray.serve.client import RayEngineClient
from nanochat_ray.on_ray.serve.connection import (
    ACCEPTED,
    MAX_HANDSHAKE_BYTES,
    NOT_HERE,
    QUEUE_FULL,
    Connection,
    SilenceLimit,
)
from nanochat_ray.on_ray.serve.endpoints import list_endpoints
from nanochat_ray.on_ray.serve.replica_set import ReplicaHandle
from nanochat_ray.serve.client import OutputStream, UnavailableError


class Replica:
    """Accepts every request unless ``reply`` says otherwise; sends one token and then either the
    end or nothing any more."""

    def __init__(self, name: str, vanishes: bool, version: str = "v1"):
        self.name, self.vanishes, self.version = name, vanishes, version
        self.is_swapping = self.replaces_weights = False
        self.swaps_at_a_request = False
        self.reply: str | None = ACCEPTED
        self.requests: list[Request] = []
        self.aborted_ids: list[str] = []
        self.silent = False

    async def start(self) -> None:
        def connection() -> Connection:
            return Connection(self._on_message, lambda _: None)

        self.server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
        self.heartbeats = asyncio.ensure_future(self._send_heartbeats())
        self.connections: list[Connection] = []
        address = self.server.sockets[0].getsockname()
        self.endpoint = {"replica": self.name, "address": address, "secret": "s"}

    def _on_message(self, connection: Connection, message: list[Any]) -> None:
        if message[0] == "handshake":
            self.connections.append(connection)
            connection.send("handshake", self.status(0 if self.vanishes else 1))
        elif message[0] == "submit":
            request = Request.from_wire(message[1])
            self.requests.append(request)
            if self.reply is None:
                return
            if self.swaps_at_a_request:
                self.is_swapping = True
                connection.send("heartbeat", self.status(1))
            details = [6.5] if self.reply == QUEUE_FULL else []
            connection.send("reply", request.id, self.reply, *details)
            if self.is_swapping or self.reply != ACCEPTED:
                return  # it waits for new weights
            if self.replaces_weights:
                error = RequestOutput(
                    request_id=request.id, tokens=[], finish="error", error=WEIGHTS_REPLACED
                )
                connection.send("outputs", [error.to_wire()])
                return
            token = 7 + len(request.output_token_ids)
            finish = None if self.vanishes else "stop"
            output = RequestOutput(
                request_id=request.id, tokens=[token], finish=finish, weight_version=self.version
            )
            connection.send("outputs", [output.to_wire()])
            self.silent = self.vanishes
        elif message[0] == "abort":
            self.aborted_ids += message[1]

    def status(self, num_requests: int) -> dict[str, Any]:
        status = {"requests": num_requests, "weight_version": self.version}
        return {**status, "is_swapping": self.is_swapping}

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            for connection in self.connections:
                if not self.silent:
                    connection.send("heartbeat", self.status(0))


class Handle:
    """Of a Serve deployment with these replicas; those that have vanished are not listed."""

    def __init__(self, replicas: Sequence[Replica]):
        self.replicas = list(replicas)

    def broadcast(self, method: str) -> Handle:
        assert method == "endpoint"
        return self

    async def results_async(self, **_: Any) -> list[dict[str, Any]]:
        return [replica.endpoint for replica in self.replicas if not replica.silent]


@contextlib.asynccontextmanager
async def connected_client(
    *replicas: Replica, follower: Any = None
) -> AsyncIterator[RayEngineClient]:
    """A client that is connected to all of them."""
    for replica in replicas:
        await replica.start()
    handle: Any = Handle(replicas)
    client = RayEngineClient(handle, deadline_s=30, liveness_timeout_s=0.5, follower=follower)
    client.start()
    async with asyncio.timeout(60):
        while sum(r.is_usable for r in client.replicas.by_name.values()) < len(replicas):
            await asyncio.sleep(0.01)
        yield client
    await client.close()
    assert not [task for task in asyncio.all_tasks() if "RayEngineClient" in repr(task.get_coro())]
    for replica in replicas:
        replica.heartbeats.cancel()
        replica.server.close()


async def tokens_of(client: RayEngineClient) -> list[list[int]]:
    stream = OutputStream()
    await client.submit(Request(id="r", prompt=[1, 2], params=SamplingParams(max_tokens=2)), stream)
    return [list(output.tokens) async for batch in stream for output in batch]


def test_replicas_that_do_not_answer_are_left_out() -> None:
    options: dict[str, Any] = {}

    class Broadcast(Handle):
        async def results_async(self, **others: Any) -> list[Any]:
            options.update(others)
            return [{"replica": "a"}, RuntimeError("gone"), {"replica": "b"}]

    handle: Any = Broadcast([])
    endpoints = asyncio.run(list_endpoints(handle))
    assert endpoints == [{"replica": "a"}, {"replica": "b"}]
    assert options == {"timeout_s": 10, "return_exceptions": True}


def test_a_host_that_is_gone_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_S", math.inf)

    async def serve() -> None:
        absent, present = Replica("a", vanishes=False), Replica("b", vanishes=False)
        await absent.start()
        await present.start()
        loop = asyncio.get_running_loop()
        connect = loop.create_connection

        async def connect_if_present(make: Any, *address: Any) -> Any:
            if address[1] == absent.endpoint["address"][1]:
                await asyncio.Event().wait()
            return await connect(make, *address)

        monkeypatch.setattr(loop, "create_connection", connect_if_present)
        handle: Any = Handle([absent, present])
        client = RayEngineClient(handle)
        client.start()
        async with asyncio.timeout(60):
            while [r.name for r in client.replicas.by_name.values() if r.is_usable] != ["b"]:
                await asyncio.sleep(0.01)
        await client.close()
        for replica in (absent, present):
            replica.heartbeats.cancel()
            replica.server.close()

    asyncio.run(serve())


def test_an_unexpected_error_ends_no_listing() -> None:
    class Broken(Handle):
        errors = [RuntimeError("the controller is gone")]  # noqa: RUF012

        async def results_async(self, **options: Any) -> list[dict[str, Any]]:
            if self.errors:
                raise self.errors.pop()
            return await super().results_async(**options)

    async def run() -> None:
        replica = Replica("a", vanishes=False)
        await replica.start()
        handle: Any = Broken([replica])
        client = RayEngineClient(handle)
        client.start()
        await until(lambda: any(r.is_usable for r in client.replicas.by_name.values()))
        await client.close()
        replica.heartbeats.cancel()
        replica.server.close()

    asyncio.run(run())


def test_requests_leave_a_host_that_vanished() -> None:
    """Its connection stays open and silent, as when a network link is cut."""

    async def run() -> None:
        vanishing, healthy = Replica("a", True), Replica("b", False)
        async with connected_client(vanishing, healthy) as client:
            assert await tokens_of(client) == [[7], [8]]
        assert len(vanishing.requests) == 1
        assert list(healthy.requests[0].output_token_ids) == [7]
        assert [vanishing.requests[0].weight_version, healthy.requests[0].weight_version] == [
            "",
            "v1",
        ]

    asyncio.run(run())


def test_a_host_may_be_silent_for_10_s() -> None:
    """For the kernel too, which drops a connection whose data is not acknowledged for so long."""
    handle: Any = Handle([])
    assert RayEngineClient(handle).liveness_timeout_s == 10
    options: list[tuple[int, int, int]] = []

    class Socket:
        def setsockopt(self, *option: int) -> None:
            options.append(option)  # type: ignore[arg-type]

    class Transport(asyncio.Transport):
        pass

    Connection(lambda *_: None, lambda _: None).connection_made(Transport({"socket": Socket()}))
    assert (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) in options
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000) in options


def test_a_late_look_calls_nobody_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limit = SilenceLimit(10.0)
    for seconds, oldest in ((5.0, 95.0), (5.1, -math.inf), (0.1, 100.2)):
        now += seconds
        assert limit.oldest() == pytest.approx(oldest)


def test_a_stranger_s_bytes_are_bounded() -> None:
    class Transport(asyncio.Transport):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    transport = Transport({"socket": SimpleNamespace(setsockopt=lambda *_: None)})
    connection = Connection(lambda *_: None, lambda _: None, is_trusted=False)
    connection.connection_made(transport)
    head = b"\xdb\x00\x00\xff\xff"  # of a text of 65,535 bytes
    connection.data_received(head + bytes(MAX_HANDSHAKE_BYTES - len(head)))
    assert not transport.is_closed
    connection.data_received(b"x")
    assert transport.is_closed


def test_own_standstill_is_no_silence() -> None:
    """Of a process that was stopped, or got no CPU time: it has only not listened."""

    async def run() -> None:
        async with connected_client(Replica("a", False)) as client:
            connection = client.replicas.by_name["a"].connection
            assert connection is not None
            # As after a second without CPU time: it has neither read nor looked.
            connection.last_received -= 1
            client.silence.last_look -= 1
            end = time.monotonic()
            await until(lambda: min(client.silence.last_look, connection.last_received) > end)
            last_message = connection.last_received
            await until(lambda: client.silence.last_look > last_message)
            assert client.replicas.by_name["a"].connection is connection

    asyncio.run(run())


def test_a_load_counts_each_request_once() -> None:
    async def run() -> None:
        handle: Any = Handle([])
        client, replica = RayEngineClient(handle), ReplicaHandle("a")
        replica.in_flight = dict.fromkeys(("x", "y"))  # type: ignore[assignment]
        for requests, load in ((5, 5), (1, 2)):  # the last one is from before they were submitted
            client._on_message(replica, ["heartbeat", {"requests": requests}])
            assert replica.load == load

    asyncio.run(run())


def test_a_request_waits_until_its_own_deadline() -> None:
    async def run() -> None:
        handle: Any = Handle([])
        client = RayEngineClient(handle, deadline_s=3600)
        request = Request(id="r", prompt=[1], params=SamplingParams(), deadline=time.monotonic())
        async with asyncio.timeout(60):
            with pytest.raises(UnavailableError, match="no engine was found in time"):
                await client.submit(request, OutputStream())

    asyncio.run(run())


def test_other_weights_continue_no_answer() -> None:
    """It fails at once, rather than mix two checkpoints."""

    async def run() -> None:
        vanishing, healthy = Replica("a", True), Replica("b", False, version="v2")
        async with connected_client(vanishing, healthy) as client:
            with pytest.raises(UnavailableError, match=r"began with v1, .* but v2: send"):
                await tokens_of(client)
        assert not healthy.requests

    asyncio.run(run())


def test_the_replica_with_its_weights_continues() -> None:
    async def run() -> None:
        replicas = Replica("a", True), Replica("b", False, version="v2"), Replica("c", False)
        async with connected_client(*replicas) as client:
            assert await tokens_of(client) == [[7], [8]]
        assert not replicas[1].requests
        assert list(replicas[2].requests[0].output_token_ids) == [7]

    asyncio.run(run())


def test_new_requests_avoid_a_swapping_replica() -> None:
    async def run() -> None:
        swapping, other = Replica("a", True), Replica("b", False)
        swapping.is_swapping = True
        async with connected_client(swapping, other) as client:
            assert await tokens_of(client) == [[7]]
        assert not swapping.requests

    asyncio.run(run())


def test_requests_without_tokens_leave_a_swap() -> None:
    """A replica begins to swap after it has accepted a request that it cannot run yet."""

    async def run() -> None:
        swapping, other = Replica("a", True), Replica("b", False)
        async with connected_client(swapping, other) as client:
            swapping.is_swapping = True  # the client has not been told
            assert await tokens_of(client) == [[7]]
            await until(lambda: swapping.aborted_ids)
        assert (len(swapping.requests), len(other.requests)) == (1, 1)
        assert swapping.aborted_ids == ["r.0"]

    asyncio.run(run())


def test_a_swap_may_begin_before_the_reply() -> None:
    """The request is not migrated while it is dispatched, but by the dispatch itself."""

    async def run() -> None:
        swapping, other = Replica("a", True), Replica("b", False)
        swapping.swaps_at_a_request = True
        async with connected_client(swapping, other) as client:
            client.replicas.by_name["b"].in_flight["x"] = None  # type: ignore[assignment]
            assert await tokens_of(client) == [[7]]
            await until(lambda: swapping.aborted_ids)
        assert (len(swapping.requests), len(other.requests)) == (1, 1)
        assert other.requests[0].id == "r.1"

    asyncio.run(run())


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("reply", [QUEUE_FULL, NOT_HERE])
def test_another_replica_takes_what_one_cannot(reply: str) -> None:
    async def run() -> None:
        idle, other = Replica("a", True), Replica("b", False)
        idle.reply = reply
        async with connected_client(idle, other) as client:
            client.replicas.by_name["b"].in_flight["x"] = None  # type: ignore[assignment]
            assert await tokens_of(client) == [[7]]
        assert (len(idle.requests), len(other.requests)) == (1, 1)

    asyncio.run(run())


def test_a_replica_that_does_not_reply_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        silent, other = Replica("a", True), Replica("b", False)
        silent.reply = None
        async with connected_client(silent, other) as client:
            monkeypatch.setattr(client_module, "CALL_TIMEOUT_S", 0.1)
            client.replicas.by_name["b"].in_flight["x"] = None  # type: ignore[assignment]
            assert await tokens_of(client) == [[7]]
            await until(lambda: "r.0" in silent.aborted_ids)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (QUEUE_FULL, EngineFull, "every engine's queue is full"),
        ("top_k=-1 is not allowed", ValueError, "^top_k=-1 is not allowed$"),
    ],
)
def test_a_refusal_leaves_nothing_behind(reply: str, error: type[Exception], message: str) -> None:
    async def run() -> None:
        replica, stream = Replica("a", False), OutputStream()
        replica.reply = reply
        request = Request(id="r", prompt=[1], params=SamplingParams(max_tokens=2))
        async with connected_client(replica) as client:
            with pytest.raises(error, match=message) as refusal:
                await client.submit(request, stream)
            assert getattr(refusal.value, "retry_after_s", 6.5) == 6.5
            assert [batch async for batch in stream] == []  # the stream waits for nothing
            handle = client.replicas.by_name["a"]
            assert not handle.in_flight
            assert not handle.replies
        assert len(replica.requests) == 1

    asyncio.run(run())


def test_a_closed_stream_aborts_its_request() -> None:
    async def run() -> None:
        replica, stream = Replica("a", True), OutputStream()
        request = Request(id="r", prompt=[1], params=SamplingParams(max_tokens=2))
        async with connected_client(replica) as client:
            replica.is_swapping = True  # it accepts the request and sends nothing
            await client.submit(request, stream)
            assert list(client.replicas.by_name["a"].in_flight) == ["r.0"]
            stream.close()
            assert not client.replicas.by_name["a"].in_flight
            await until(lambda: replica.aborted_ids)
        assert replica.aborted_ids == ["r.0"]

    asyncio.run(run())


@pytest.mark.parametrize("has_reply", [False, True])
def test_a_client_may_leave_before_the_reply(has_reply: bool) -> None:
    """Or in the iteration of the event loop in which the reply comes."""

    async def run() -> None:
        replica, stream = Replica("a", False), OutputStream()
        replica.reply = None
        request = Request(id="r", prompt=[1], params=SamplingParams(max_tokens=2))
        async with connected_client(replica) as client:
            submission = asyncio.ensure_future(client.submit(request, stream))
            await until(lambda: replica.requests)
            if has_reply:
                client._on_message(client.replicas.by_name["a"], ["reply", "r.0", ACCEPTED])
            submission.cancel()
            with pytest.raises(asyncio.CancelledError):
                await submission
            assert [batch async for batch in stream] == []
            await until(lambda: replica.aborted_ids)
        assert replica.aborted_ids == ["r.0"]

    asyncio.run(run())


def test_a_request_without_tokens_survives_new_weights() -> None:
    """The replica has ended it, since its weights were replaced; it begins again elsewhere."""

    async def run() -> None:
        first, other = Replica("a", True), Replica("b", False)
        first.replaces_weights = True
        async with connected_client(first, other) as client:
            client.replicas.by_name["b"].in_flight["x"] = None  # type: ignore[assignment]

            async def begin_elsewhere() -> None:
                await until(lambda: first.requests)
                first.reply = QUEUE_FULL

            _, tokens = await asyncio.gather(begin_elsewhere(), tokens_of(client))
            assert tokens == [[7]]

    asyncio.run(run())


def test_a_draining_replica_gets_no_request() -> None:
    async def run() -> None:
        draining, other = Replica("a", True), Replica("b", False)
        async with connected_client(draining, other) as client:
            draining.connections[0].send("draining")
            await until(lambda: client.replicas.by_name["a"].is_draining)
            client.replicas.by_name["b"].in_flight["x"] = None  # type: ignore[assignment]
            assert await tokens_of(client) == [[7]]
        assert not draining.requests

    asyncio.run(run())


def test_an_unlisted_replica_ends_when_idle() -> None:
    """One with requests keeps its connection until they are complete."""

    async def run() -> None:
        idle, busy = Replica("a", False), Replica("b", False)
        async with connected_client(idle, busy) as client:
            busy_handle = client.replicas.by_name["b"]
            busy_handle.in_flight["x"] = None  # type: ignore[assignment]
            client.handle.replicas.clear()  # type: ignore[attr-defined]
            client.replicas.list_now.set()
            await until(lambda: "a" not in client.replicas.by_name)
            assert client.replicas.by_name == {"b": busy_handle}
            assert not busy_handle.is_usable
            busy_handle.in_flight.clear()

    asyncio.run(run())


class Follower:
    """Of the deployment that swaps weights: its handle, and the result of a call."""

    @property
    def status(self) -> Follower:
        return self

    async def remote(self) -> dict[str, str]:
        return {"checkpoint": "step-000007"}


def test_replicas_are_listed_without_the_follower(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it restarts its calls wait."""
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_S", 1000.0)

    class Restarting(Follower):
        async def remote(self) -> dict[str, str]:
            await asyncio.get_running_loop().create_future()
            return {}

    async def run() -> None:
        first, later = Replica("a", False), Replica("b", False)
        async with connected_client(first, follower=Restarting()) as client:
            await later.start()
            client.handle.replicas.append(later)  # type: ignore[attr-defined]
            client.replicas.list_now.set()
            await until(lambda: "b" in client.replicas.by_name)
            later.heartbeats.cancel()
            later.server.close()

    asyncio.run(run())


@pytest.mark.parametrize("follower", [None, Follower()])
def test_health_names_engines_and_follower(follower: Any) -> None:
    async def run() -> None:
        async with connected_client(Replica("a", False), follower=follower) as client:
            await until(lambda: follower is None or client.follow_status)
            health = await client.health()
            client.replicas.by_name["a"].is_ready = False
            with pytest.raises(UnavailableError, match="no engine is running"):
                await client.health()
        (engine,) = health.pop("engines")
        assert engine["weight_version"] == "v1"
        assert health == ({} if follower is None else {"follow": {"checkpoint": "step-000007"}})

    asyncio.run(run())
