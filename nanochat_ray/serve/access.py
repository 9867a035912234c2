"""Middleware for every request: its id, one line in the access log, and a response to defects.

The line has method, path, status, time, bytes and id: no query, key, prompt or answer. HEAD is
answered as GET, without a body.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_ray.serve.openai import errors

logger = logging.getLogger(__name__)
failures = logging.getLogger(f"{__name__}.failures")

REQUEST_ID = b"x-request-id"
MAX_PATH = 200
_ALLOWED_ID = re.compile(rb"[\w.:+/=@-]{1,128}", re.ASCII)

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""The id of the request that the current task serves."""


def log_to(handlers: Sequence[logging.Handler]) -> None:
    """Sends the access log to ``handlers`` alone."""
    logger.handlers = list(handlers)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def id_of(headers: dict[bytes, bytes]) -> bytes:
    """The id of a request: the client's if it has an allowed one, else a new one."""
    header = headers.get(REQUEST_ID, b"")
    return header if _ALLOWED_ID.fullmatch(header) else secrets.token_hex(16).encode()


def log(method: str, path: str, status: int, seconds: float, size: int, own: str) -> None:
    """Writes the line of a request; ``path``: percent-encoded, ``size``: bytes of the response's
    body."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(
            "%s %s %d %.1f ms %d bytes id=%s",
            method,
            path,
            status,
            1000 * seconds,
            size,
            own,
            extra={"log_to_stderr": False},  # Serve's, which would send it to the driver
        )


@dataclass
class _Response:
    status: int = 0
    """0 until the response starts; logged as 499 if the client disconnects before."""
    size: int = 0
    """Bytes of the body."""


class AccessLog:
    """ASGI middleware, the outermost of the application."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        own = id_of(dict(scope["headers"]))
        request_id.set(own.decode())
        head = scope["method"] == "HEAD"
        response, start = _Response(), time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                response.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (REQUEST_ID, own)]}
            elif message["type"] == "http.response.body":
                body = b"" if head else message.get("body", b"")
                response.size += len(body)
                message = {**message, "body": body}
            await send(message)

        try:
            await self._answer({**scope, "method": "GET"} if head else scope, receive, send_with_id)
        finally:
            seconds, status = time.perf_counter() - start, response.status or 499
            log(scope["method"], _path(scope), status, seconds, response.size, own.decode())

    async def _answer(self, scope: Scope, receive: Receive, send: Any) -> None:
        has_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except ClientDisconnect:
            return  # the client disconnected within the body of its request
        except BaseException as error:
            # A panic in Rust is a BaseException; the other BaseExceptions end the task or process.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            failures.exception("%s failed, id=%s", _path(scope), request_id.get())
            if has_started:  # a truncated response must not look complete
                raise RuntimeError("the response was cut short") from error
            with contextlib.suppress(OSError):
                await errors.internal().response()(scope, receive, send)


def _path(scope: Scope) -> str:
    """The path, percent-encoded: without line breaks and control characters."""
    raw = scope.get("raw_path") or scope["path"].encode()
    return raw[:MAX_PATH].decode("ascii", errors="backslashreplace").split("?")[0]
