"""What Serve's HTTP server in an ingress does otherwise than by default, mostly for floods.

By default a burst of connections stops every stream until all of it is read and refused: asyncio
accepts all that wait in one iteration of its event loop, and Serve spends more CPU time on each
request (tasks, contexts, metrics) than the application on a refusal.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto

from nanochat_ray.serve.http_server import disable_nagle
from nanochat_ray.serve.protocol import HttpConnection
from nanochat_ray.serve.refusals import Refusals

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares"}
"""Makes Serve call ``middlewares`` in an ingress."""
ACCEPTS = 64
"""Connections that are accepted in an iteration of the event loop. Each costs about as much CPU
time as four tokens of a stream."""


def middlewares() -> list[Middleware]:
    """Of the server that Serve is about to start in this process's event loop."""
    prepare_listeners(asyncio.get_running_loop())
    auto.AutoHTTPProtocol = IngressConnection  # where uvicorn's Config looks for it
    return [Middleware(SingleRequestId)]


class IngressConnection(HttpConnection):
    """Refuses before Serve sees a request."""

    @property
    def refusals(self) -> Refusals | None:
        # Serve starts the server before its context has the ingress.
        ingress: Any = serve.get_replica_context().servable_object
        return None if ingress is None else ingress.app.state.refusals


class SingleRequestId:
    """ASGI middleware around Serve, which adds an ``x-request-id`` to that of the application: a
    client would read both as one value."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_one(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if len(values := headers.getlist("x-request-id")) > 1:
                    headers["x-request-id"] = values[0]  # drops the others
            await send(message)

        await self._app(scope, receive, send_with_one)


def prepare_listeners(loop: Any) -> None:
    """Servers that ``loop`` starts for a given socket accept ``ACCEPTS`` connections at a time, and
    send on them without Nagle's algorithm.

    As many as their ``backlog`` still wait in the kernel: asyncio uses that number for both.
    """
    if not isinstance(loop, asyncio.SelectorEventLoop):
        return
    create_server = loop.create_server

    async def create_prepared_server(*args: Any, backlog: int = 100, **options: Any) -> Any:
        server = await create_server(*args, backlog=min(ACCEPTS, backlog), **options)
        if (sock := options.get("sock")) is not None:
            sock.listen(backlog)
            disable_nagle(sock)
        return server

    loop.create_server = create_prepared_server  # type: ignore[method-assign]
