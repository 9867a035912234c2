"""A flood costs little, and does not stop the streams."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import pytest
from ray import serve
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from nanochat_ray.on_ray.serve import http_server
from nanochat_ray.on_ray.serve.deployment import INGRESS_ENVIRONMENT
from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.asgi import call, http
from tests.serve.scripted import ScriptedClient
from tests.serve.test_gate import FULL


def test_only_a_refusal_passes_by_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, paths = ScriptedClient([65]), []
    app = build_app(engine, Tokenizer.bytes_only(), "m", 256)
    context = SimpleNamespace(servable_object=SimpleNamespace(app=app))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)

    async def through_serve(scope: Scope, receive: Receive, send: Send) -> None:
        paths.append(scope["path"])
        await app(scope, receive, send)

    async def middlewares() -> list[Middleware]:
        return http_server.middlewares()

    (middleware,) = asyncio.run(middlewares())
    server = middleware.cls(through_serve, *middleware.args, **middleware.kwargs)

    def post(path: str) -> int:
        status = call(server, http(path, content_type="application/json"), b'{"prompt": "x"}')
        return int(status[0]["status"])

    assert post("/v1/completions") == 200
    engine.refuse = FULL
    assert post("/v1/completions") == 429  # the engine has refused it
    assert post("/v1/completions") == 429
    assert post("/tokenize") == 200
    assert paths == ["/v1/completions", "/v1/completions", "/tokenize"]


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
