"""The ingress's client against replicas that are plain TCP servers; no Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from nanochat_ray.engine.request import Request, RequestOutput, SamplingParams
from nanochat_ray.on_ray.serve.client import RayEngineClient
from nanochat_ray.on_ray.serve.connection import ACCEPTED, Connection
from nanochat_ray.serve.client import OutputStream, UnavailableError


class Replica:
    """Accepts every request; sends one token and then either the end or nothing any more."""

    def __init__(self, name: str, vanishes: bool, version: str = "v1"):
        self.name, self.vanishes, self.version = name, vanishes, version
        self.is_swapping = False
        self.requests: list[Request] = []
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
            connection.send("reply", request.id, ACCEPTED)
            if self.is_swapping:
                return  # it waits for new weights
            token = 7 + len(request.output_token_ids)
            finish = None if self.vanishes else "stop"
            output = RequestOutput(
                request_id=request.id, tokens=[token], finish=finish, weight_version=self.version
            )
            connection.send("outputs", [output.to_wire()])
            self.silent = self.vanishes

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
        self.replicas = replicas

    def broadcast(self, method: str) -> Handle:
        assert method == "endpoint"
        return self

    async def results_async(self, **_: Any) -> list[dict[str, Any]]:
        return [replica.endpoint for replica in self.replicas if not replica.silent]


@contextlib.asynccontextmanager
async def connected_client(*replicas: Replica) -> AsyncIterator[RayEngineClient]:
    """A client that is connected to all of them."""
    for replica in replicas:
        await replica.start()
    client = RayEngineClient(Handle(replicas), deadline_s=30, liveness_timeout_s=0.5)  # type: ignore[arg-type]
    client.start()
    async with asyncio.timeout(30):
        while sum(r.is_usable for r in client.replicas.by_name.values()) < len(replicas):
            await asyncio.sleep(0.01)
        yield client
    await client.close()
    for replica in replicas:
        replica.heartbeats.cancel()
        replica.server.close()


async def tokens_of(client: RayEngineClient) -> list[list[int]]:
    stream = OutputStream()
    await client.submit(Request(id="r", prompt=[1, 2], params=SamplingParams(max_tokens=2)), stream)
    return [list(output.tokens) async for batch in stream for output in batch]


def test_requests_leave_a_host_that_vanished() -> None:
    """Its connection stays open and silent, as when a network link is cut."""

    async def run() -> None:
        vanishing, healthy = Replica("a", True), Replica("b", False)
        async with connected_client(vanishing, healthy) as client:
            assert await tokens_of(client) == [[7], [8]]
        assert len(vanishing.requests) == 1
        assert list(healthy.requests[0].output_token_ids) == [7]

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
        assert (len(swapping.requests), len(other.requests)) == (1, 1)

    asyncio.run(run())
