"""The ingress's client against replicas that are plain TCP servers; no Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nanochat_ray.engine.request import Request, RequestOutput, SamplingParams
from nanochat_ray.on_ray.serve import client as client_module
from nanochat_ray.on_ray.serve.client import RayEngineClient
from nanochat_ray.on_ray.serve.connection import ACCEPTED, Connection
from nanochat_ray.serve.client import OutputStream


class Replica:
    """Accepts every request; sends one token and then either the end or nothing any more."""

    def __init__(self, name: str, vanishes: bool):
        self.name, self.vanishes = name, vanishes
        self.requests: list[Request] = []
        self.silent = False

    async def start(self) -> dict[str, Any]:
        def connection() -> Connection:
            return Connection(self._on_message, lambda _: None)

        self.server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
        self.heartbeats = asyncio.ensure_future(self._send_heartbeats())
        self.connections: list[Connection] = []
        address = self.server.sockets[0].getsockname()
        return {"replica": self.name, "address": address, "secret": "s"}

    def _on_message(self, connection: Connection, message: list[Any]) -> None:
        if message[0] == "handshake":
            self.connections.append(connection)
            connection.send("handshake", {"requests": 0 if self.vanishes else 1})
        elif message[0] == "submit":
            request = Request.from_wire(message[1])
            self.requests.append(request)
            connection.send("reply", request.id, ACCEPTED)
            token = 7 + len(request.output_token_ids)
            finish = None if self.vanishes else "stop"
            output = RequestOutput(request_id=request.id, tokens=[token], finish=finish)
            connection.send("outputs", [output.to_wire()])
            self.silent = self.vanishes

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            for connection in self.connections:
                if not self.silent:
                    connection.send("heartbeat", {"requests": 0})


class Handle:
    """Of a Serve deployment with these endpoints."""

    def __init__(self, endpoints: list[dict[str, Any]]):
        self.endpoints = endpoints

    def broadcast(self, method: str) -> Handle:
        assert method == "endpoint"
        return self

    async def results_async(self, **_: Any) -> list[dict[str, Any]]:
        return self.endpoints


def test_requests_leave_a_host_that_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stays open and silent, as when a network link is cut."""
    monkeypatch.setattr(client_module, "SILENCE_S", 0.5)

    async def run() -> None:
        vanishing, healthy = Replica("a", True), Replica("b", False)
        handle = Handle([await vanishing.start(), await healthy.start()])
        client = RayEngineClient(handle, deadline_s=30)  # type: ignore[arg-type]
        client.start()
        stream = OutputStream()
        request = Request(id="r", prompt=[1, 2], params=SamplingParams(max_tokens=2))
        async with asyncio.timeout(30):
            while (
                not all(r.is_usable for r in client.replicas.values()) or len(client.replicas) < 2
            ):
                await asyncio.sleep(0.01)
            await client.submit(request, stream)
            outputs = [output async for batch in stream for output in batch]
        assert [list(o.tokens) for o in outputs] == [[7], [8]]
        assert len(vanishing.requests) == 1
        assert list(healthy.requests[0].output_token_ids) == [7]
        await client.close()
        for replica in (vanishing, healthy):
            replica.heartbeats.cancel()
            replica.server.close()

    asyncio.run(run())
