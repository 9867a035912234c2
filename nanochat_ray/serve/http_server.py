"""uvicorn with a socket that is bound in advance, and with bounded connections and shutdown.

What uvicorn refuses by itself (no valid head, one that is too long or too slow) is answered in
OpenAI's form too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from fastapi import FastAPI

from nanochat_ray.serve.connections import ConnectionGuard, raise_file_limit
from nanochat_ray.serve.openai.errors import ApiError, invalid
from nanochat_ray.serve.protocol import MAX_HEAD_BYTES, H11Connection, HttpConnection
from nanochat_ray.serve.refusals import Refusals

SHUTDOWN_S = 5.0
"""How long answers may continue after SIGTERM."""
SWEEP_TICKS = 5
"""The guard looks at the connections after this many tenths of a second."""


class _Config(uvicorn.Config):
    def __init__(self, app: FastAPI, guard: ConnectionGuard, **options: Any):
        super().__init__(app, **options)
        self.guard = guard
        state = getattr(app, "state", None)
        self.refusals: Refusals | None = getattr(state, "refusals", None)


class _Server(uvicorn.Server):
    async def on_tick(self, counter: int) -> bool:
        if counter % SWEEP_TICKS == 0:
            cast(_Config, self.config).guard.sweep()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Also ends the connections whose client does not read, which uvicorn leaves open."""
        await super().shutdown(sockets)
        for connection in tuple(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


# The two protocols of uvicorn have these methods and attributes in common, but no base.
if TYPE_CHECKING:
    _Base = HttpConnection
else:
    _Base = object


class _BoundedConnection(_Base):
    """Tells the guard when the connection waits for its client."""

    @property
    def guard(self) -> ConnectionGuard:
        return cast(_Config, self.config).guard

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.guard.make_room(len(self.connections)):
            self.guard.await_request(self)
        else:
            busy = ApiError(503, "Too many connections are open.", kind="server_error")
            self.refuse(busy, retry_after_s=1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.forget(self)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:  # no other is in the pipeline
            self.guard.await_request(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.guard.begin_stall(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.guard.end_stall(self)

    def expire(self) -> None:
        self.transport.close()
        if self.transport.get_write_buffer_size():  # closed once the client has read the rest
            self.guard.begin_stall(self)

    def abort(self) -> None:
        self.transport.abort()

    def refuse(self, error: ApiError, retry_after_s: int | None = None) -> None:
        """Answers what is no request yet, and closes."""
        if getattr(self, "_closes", False):  # it has its answer already
            self.transport.close()
            return
        body = json.dumps(error.body()).encode()
        lines = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            *([f"retry-after: {retry_after_s}"] if retry_after_s is not None else []),
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.refuse(invalid(msg))


class _H11(_BoundedConnection, H11Connection):  # type: ignore[misc]
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.guard.begin_request(self)


class _ResponseTransport:
    """What a response is written to. Its ``close`` waits for the rest of the request: a connection
    that is closed before is reset, and a client that still sends may not read the response (RFC
    9112, 9.6)."""

    def __init__(self, connection: _Protocol):
        self._connection, self._cycle = connection, connection.cycle
        self._transport = connection.transport
        self.is_closing = self._transport.is_closing

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        if self._cycle.more_body and not self.is_closing():
            self._connection.drain_request()
            self._transport.write_eof()
        else:
            self._transport.close()


class _Protocol(_BoundedConnection, HttpConnection):
    """Also bounds a head, and its time."""

    h11_class = _H11
    _num_head_bytes = 0

    @property
    def refusals(self) -> Refusals | None:
        return cast(_Config, self.config).refusals

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_head_bytes = 0

    def on_headers_complete(self) -> None:
        self.guard.begin_request(self)
        super().on_headers_complete()
        if not self.cycle.response_complete:
            self.cycle.transport = cast(asyncio.Transport, _ResponseTransport(self))

    def drain_request(self) -> None:
        """Reads the rest of the request, for as long as a head may take, then closes."""
        self._closes = True
        self.guard.await_request(self)

    def expire(self) -> None:
        if self._is_in_head:
            self.refuse(ApiError(408, "The head of the request came too slowly."))
        else:
            super().expire()

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        super().data_received(data)
        if was_in_head and self._is_in_head and not self.transport.is_closing():
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                text = f"The head of the request is longer than {MAX_HEAD_BYTES:,} bytes."
                self.refuse(ApiError(431, text))

    def _hand_over(self, data: bytes) -> None:
        self.guard.forget(self)
        super()._hand_over(data)


def server_of(app: FastAPI, guard: ConnectionGuard | None = None) -> uvicorn.Server:
    """A server for the socket of ``bind``. Without a ``guard`` it raises this
    process's limit on open files."""
    # uvicorn may not set up logging: the access log is the application's own.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    config = _Config(
        app,
        guard or ConnectionGuard(raise_file_limit()),
        http=_Protocol,
        # uvloop accepts one connection in an iteration of its event loop (libuv since 1.47): in a
        # flood they would wait for seconds to be refused.
        loop="asyncio",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return _Server(config)


def run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; answers then have ``SHUTDOWN_S``.

    uvicorn raises the signal again at its end. With handlers of the caller that would end the
    process before it has released what it holds.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, server.handle_exit) for number in signals}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, on "::" for IPv4 too. ValueError if the address is not free or not of
    this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    takes_both = host == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            (host, port), family=family, backlog=2048, dualstack_ipv6=takes_both
        )
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"port={port} on host={host} is not allowed: {reason}") from None
    disable_nagle(listener)
    return listener


def disable_nagle(listener: socket.socket) -> None:
    """For the connections that it accepts: they inherit the option.

    asyncio sets it on connections of its own listeners alone. With Nagle's algorithm the body of
    an answer waits until its client has acknowledged the head: for 40 ms on a connection that is
    kept alive (delayed acknowledgements, RFC 1122, 4.2.3.2).
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
