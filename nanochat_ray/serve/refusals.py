"""Answers the requests of a flood from their heads.

While the engines refuse a client, nothing that its requests carry matters. To answer one within the
HTTP parser takes a third of the CPU time of a task through all middleware, and on one machine that
time is the engines'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from nanochat_ray.engine.request import EngineFull
from nanochat_ray.serve import access
from nanochat_ray.serve.auth import content_length, name_of_client
from nanochat_ray.serve.hosts import is_allowed
from nanochat_ray.serve.keys import KeyRing
from nanochat_ray.serve.openai import errors
from nanochat_ray.serve.serving import Serving

Headers = Sequence[tuple[bytes, bytes]]
STARTED = "nanochat_started"
"""In the scope of a request that has passed the gate."""


class Refusals:
    """What an application answers to requests that its gate refuses."""

    def __init__(
        self,
        serving: Serving,
        keys: KeyRing,
        paths: Sequence[str],
        allowed_hosts: Sequence[str],
    ):
        """``paths``: of the requests that pass the gate of ``serving``."""
        self._gate, self._metrics, self._keys = serving.gate, serving.metrics, keys
        self._max_body_bytes = serving.limits.max_body_bytes
        self._paths = frozenset(path.encode() for path in paths)
        self._allowed_hosts = [host.lower() for host in allowed_hosts]
        self._last: EngineFull | None = None
        self._headers: Headers = ()
        self._body = b""

    def answer(self, target: bytes, scope: Scope) -> tuple[int, Headers, bytes] | None:
        """Status, headers and body of the answer to a POST, which is counted and logged; None if
        the application has to look at it: the gate lets it pass, or it may be wrong in itself."""
        if target not in self._paths:
            return None
        fields = dict(scope["headers"])
        if (
            fields.get(b"content-type") != b"application/json"
            or b"content-encoding" in fields
            or b"origin" in fields  # CORS
            or content_length(fields) > self._max_body_bytes
        ):
            return None
        host = fields.get(b"host", b"").decode("latin-1")
        if self._allowed_hosts and host and not is_allowed(host, self._allowed_hosts):
            return None
        client = name_of_client(self._keys, fields) if self._keys else ""
        if client is None:
            return None
        refusal = self._gate.refusal(client)
        if refusal is None:
            if self._gate.is_flooded(client):
                self._gate.start()
                scope[STARTED] = True
            return None
        if refusal is not self._last:
            response = errors.queue_full(str(refusal), refusal.retry_after_s).response()
            self._last, self._headers = refusal, response.raw_headers
            self._body = bytes(response.body)
        self._metrics.refusals(1, "429")
        own = access.id_of(fields)
        access.log("POST", target.decode(), 429, 0.0, len(self._body), own.decode())
        return 429, [*self._headers, (access.REQUEST_ID, own)], self._body


class _NoCycle:
    """In place of uvicorn's ``RequestResponseCycle``, for a request whose body is dropped."""

    response_complete = True
    message_event = asyncio.Event()
    """Nobody waits for it."""


class RefusingConnection(HttpToolsProtocol):
    """A connection of a server whose application has ``Refusals``."""

    _closes = False
    """Once the request is complete: a client that still sends may not read the answer (RFC 9112,
    9.6)."""

    @property
    def refusals(self) -> Refusals | None:
        """Those of the application; None if it has none, or is not built yet."""
        raise NotImplementedError

    def on_headers_complete(self) -> None:
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
        is_busy = self.cycle is not None and not self.cycle.response_complete
        return is_busy or self.expect_100_continue or self.parser.get_method() != b"POST"

    def _answer(self) -> tuple[int, Headers, bytes] | None:
        refusals = self.refusals
        return None if refusals is None else refusals.answer(self.url, cast(Scope, self.scope))

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._closes:
            self.transport.close()


_NO_CYCLE: Any = _NoCycle()
