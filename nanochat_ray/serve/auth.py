"""Middleware that runs before a request is read: API keys, and a limit on the body."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_ray.checks import require
from nanochat_ray.serve.keys import KeyRing
from nanochat_ray.serve.openai.errors import ApiError

OPEN_PATHS = ("/", "/health", "/metrics", "/version", "/openapi.json")
"""Answered without an API key: the chat page asks its user for one."""
CLIENT = "nanochat_client"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", re.IGNORECASE)


def client_of(request: Request) -> str:
    """The name of the API key that the request carries; "" if the server needs none."""
    return request.scope.get(CLIENT, "")


def name_of_client(keys: KeyRing, headers: dict[bytes, bytes]) -> str | None:
    """The name of the key that a request carries in its head; None without a valid one."""
    authorization = headers.get(b"authorization", b"")
    scheme, _, key = authorization.partition(b" ")
    return keys.name_of(key.strip()) if scheme.lower() == b"bearer" else None


def check_origins(field: str, origins: Sequence[str]) -> None:
    """ValueError for a value that no browser sends as ``Origin``."""
    for origin in origins:
        require(
            origin in ("*", "null") or _ORIGIN.fullmatch(origin) is not None,
            field,
            origin,
            "* or scheme://host[:port], without a path",
        )


class AuthMiddleware:
    """Answers 401 to a request without one of ``keys``.

    Without keys every request passes. The engine shares its slots fairly between the names that
    this class stores in the scope.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client = name_of_client(self.keys, dict(scope["headers"]))
        scope[CLIENT] = client or ""
        if self.keys and _route_path(scope) not in OPEN_PATHS and client is None:
            refusal = ApiError(
                401,
                "The API key is missing or wrong: send 'Authorization: Bearer <key>'.",
                kind="authentication_error",
                code="invalid_api_key",
            )
            await refusal.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _route_path(scope: Scope) -> str:
    """The path below the prefix at which the server has mounted the app (ASGI's ``root_path``)."""
    return str(scope["path"]).removeprefix(scope.get("root_path", "")) or "/"


class BodySizeLimit:
    """Answers 413 to a body above ``max_bytes``, and 408 to one that takes longer than
    ``timeout_s``. A chunked body declares no length, so its bytes are counted as they come."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float):
        self.app = app
        self.max_bytes, self.timeout_s = max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if content_length(dict(scope["headers"])) > self.max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        num_bytes, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.timeout_s

        async def limit() -> Message:
            nonlocal num_bytes, complete
            try:
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                text = f"The body did not come within {self.timeout_s:g} s."
                raise HTTPException(408, text) from None
            complete = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        await self.app(scope, limit, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.max_bytes:,} bytes.")


def content_length(headers: dict[bytes, bytes]) -> int:
    """Bytes of the body that a request declares; 0 if it does not."""
    length = headers.get(b"content-length", b"0")
    return int(length[:19]) if length.isdigit() else 0
