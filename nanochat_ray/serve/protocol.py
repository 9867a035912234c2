"""uvicorn's HTTP protocol where it needs more: upgrades, HTTP/1.0, and the refusals of a flood."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from nanochat_ray.serve.refusals import Headers, Refusals

MAX_HEAD_BYTES = 1 << 16
"""Of a request's line and headers."""
DRAIN_S = 10.0
"""For which a client may send the rest of a request that is refused already."""


class H11Connection(H11Protocol):
    """h11, which accepts what offers an upgrade, and knows that HTTP/1.0 has no chunks."""

    def _unsupported_upgrade_warning(self) -> None:
        """The client continues with HTTP/1.1, as it must without an upgrade (RFC 9110, 7.8)."""


class _NoCycle:
    """In place of uvicorn's ``RequestResponseCycle``, for a request whose body is dropped."""

    response_complete = True
    message_event = asyncio.Event()
    """Nobody waits for it."""


_NO_CYCLE: Any = _NoCycle()


class HttpConnection(HttpToolsProtocol):
    """httptools; h11, which is slower, for a connection whose requests offer an upgrade or are
    HTTP/1.0.

    httptools stops parsing at ``Upgrade`` and loses the body, or takes it for a request. Java's
    HttpClient offers ``h2c`` with every request. With httptools uvicorn streams to HTTP/1.0 in
    chunks, which that does not have.

    Requests that ``refusals`` refuses are answered here, from their heads.
    """

    h11_class: type[H11Protocol] = H11Connection
    _is_in_head = False
    _is_in_body = False
    _head: bytes | None = b""
    """What has come of a head that is not complete; None if it began behind other bytes."""
    _num_heads = 0
    """That began in this packet."""
    _closes = False
    """Once the request is complete: a client that still sends may not read the answer (RFC 9112,
    9.6)."""
    _drain: asyncio.TimerHandle | None = None
    _ignores_data = False

    @property
    def refusals(self) -> Refusals | None:
        """Those of the application; None if it has none, or is not built yet."""
        return None

    def data_received(self, data: bytes) -> None:
        if self._ignores_data:
            return
        was_idle = not self._is_in_head and not self._is_in_body
        head = b"" if was_idle else self._head
        if self._is_in_body or self._is_busy or len(head or b"") > MAX_HEAD_BYTES:
            head = None
        if head is not None:
            head += data
            if _needs_h11(head):
                self._hand_over(head)
                return
        self._num_heads = 0
        super().data_received(data)
        is_first = self._num_heads == (1 if was_idle else 0)
        self._head = head if self._is_in_head and is_first else None
        if self._is_in_body and self.cycle is _NO_CYCLE and self._drain is None:
            self._drain = self.loop.call_later(DRAIN_S, self.transport.close)

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _hand_over(self, data: bytes) -> None:
        """Goes on with h11, which has not seen ``data`` yet."""
        self._is_in_head = False
        self.connections.discard(self)
        self._unset_keepalive_if_required()
        other = self.h11_class(self.config, self.server_state, self.app_state, _loop=self.loop)
        other.connection_made(self.transport)
        self.transport.set_protocol(other)
        if self.flow.write_paused:  # asyncio does not say it again
            other.pause_writing()
        other.data_received(data.lstrip(b"\r\n"))  # RFC 9112, 2.2; h11 does not

    def _unsupported_upgrade_warning(self) -> None:
        """An offer behind another request in its packet, which h11 has not got. httptools takes its
        body for what follows the upgrade; so nothing that comes now can be read."""
        self.cycle.keep_alive = False
        self._ignores_data = True

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._num_heads += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # a trailer is dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head, self._is_in_body = False, True
        answer = None if self._needs_application() else self._answer()
        if answer is None:
            super().on_headers_complete()
            return
        keeps_alive = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        status, headers, body = answer
        lines = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            lines += [name, b": ", value, b"\r\n"]
        if not keeps_alive:
            lines.append(b"connection: close\r\n")
        self.transport.write(b"".join([*lines, b"\r\n", body]))
        self.cycle = _NO_CYCLE
        self._closes = not keeps_alive
        self.on_response_complete()

    def _needs_application(self) -> bool:
        return (
            self._is_busy
            or self.flow.write_paused  # the application waits until the client reads
            or self.expect_100_continue
            or self.parser.should_upgrade()
            or self.parser.get_method() != b"POST"
        )

    def _answer(self) -> tuple[int, Headers, bytes] | None:
        refusals = self.refusals
        return None if refusals is None else refusals.answer(self.url, cast(Scope, self.scope))

    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._stop_drain()
        super().on_message_complete()
        if self._closes:
            self.transport.close()
        elif self.cycle is _NO_CYCLE and self.timeout_keep_alive_task is None:
            # The body has ended the one that began with the answer.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_drain()
        super().connection_lost(exc)

    def _stop_drain(self) -> None:
        if self._drain is not None:
            self._drain.cancel()
            self._drain = None


def _needs_h11(data: bytes) -> bool:
    head, end, _ = data[:MAX_HEAD_BYTES].partition(b"\r\n\r\n")
    is_old = head.partition(b"\r\n")[0].endswith(b" HTTP/1.0")
    return bool(end) and (is_old or b"\r\nupgrade:" in head.lower())
