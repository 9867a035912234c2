"""A flood costs little, and does not stop the streams."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from ray import serve
from ray.serve._private.http_util import RequestIdMiddleware
from uvicorn.protocols.http import auto
from uvicorn.server import ServerState

from nanochat_ray.on_ray.serve import http_server
from nanochat_ray.on_ray.serve.deployment import INGRESS_ENVIRONMENT
from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.asgi import call, http
from tests.serve.scripted import ScriptedClient


def test_connections_of_serve_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    app = build_app(ScriptedClient([65]), Tokenizer.bytes_only(), "m", 256)
    context = SimpleNamespace(servable_object=None)
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)

    async def run() -> None:
        assert [m.cls for m in http_server.middlewares()] == [http_server.SingleRequestId]
        config = uvicorn.Config(app, lifespan="off", log_config=None)  # as Serve's
        config.load()
        connection: Any = config.http_protocol_class
        assert connection is http_server.IngressConnection
        connection = connection(config, ServerState(), {})
        assert connection.refusals is None
        context.servable_object = SimpleNamespace(app=app)
        assert connection.refusals is app.state.refusals

    asyncio.run(run())


@pytest.mark.parametrize("client_id", [None, "r1", "not allowed"])
def test_a_response_has_one_request_id(client_id: str | None) -> None:
    app = RequestIdMiddleware(build_app(ScriptedClient([65]), Tokenizer.bytes_only(), "m", 256))
    headers = {} if client_id is None else {"x_request_id": client_id}
    scope = http("/v1/models", "GET", **headers)
    start = call(http_server.SingleRequestId(app), scope, b"")[0]
    ids = [value for name, value in start["headers"] if name.lower() == b"x-request-id"]
    assert len(ids) == 1
    assert client_id != "r1" or ids == [b"r1"]
    assert client_id != "not allowed" or ids != [b"not allowed"]


def test_serve_can_import_the_middlewares() -> None:
    module, _, name = INGRESS_ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(
        ":"
    )
    assert module == http_server.__name__
    assert getattr(http_server, name) is http_server.middlewares


def test_a_burst_is_accepted_gradually() -> None:
    counts, has_nagle = [0], set()

    class Counter(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            counts[-1] += 1
            connection = transport.get_extra_info("socket")
            has_nagle.add(not connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async def run(sock: socket.socket, count: int) -> None:
        loop = asyncio.get_running_loop()
        http_server.prepare_listeners(loop)
        server = await loop.create_server(Counter, sock=sock, backlog=count)
        # All of them wait in the kernel, which without room for them would let connect wait.
        clients = [socket.create_connection(sock.getsockname(), timeout=30) for _ in range(count)]
        while sum(counts) < count:
            counts.append(0)
            await asyncio.sleep(0)  # one iteration
        for client in clients:
            client.close()
        server.close()

    count = 3 * http_server.ACCEPTS
    with socket.create_server(("127.0.0.1", 0)) as sock:
        asyncio.run(asyncio.wait_for(run(sock, count), 60))
    assert sum(counts) == count
    assert max(counts) <= http_server.ACCEPTS
    assert has_nagle == {False}
