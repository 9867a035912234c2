"""What is asked of a request before anybody reads it: its size, and a key where one is needed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_ray.checks import require
from nanochat_ray.serve.errors import ApiError
from nanochat_ray.serve.keys import KeyRing

OPEN_PATHS = ("/", "/health", "/metrics", "/version", "/openapi.json")
"""Answered without a key: the page asks for one itself."""


CLIENT = "nanochat_client"


def client_of(request: Request) -> str:
    """Who asks, as far as the keys tell; "" where nobody needs one."""
    return request.scope.get(CLIENT, "")


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+", re.IGNORECASE)


def check_origins(field: str, origins: Sequence[str]) -> None:
    """ValueError for what no browser sends as ``Origin``."""
    for origin in origins:
        require(
            origin in ("*", "null") or _ORIGIN.fullmatch(origin) is not None,
            field,
            origin,
            "* or scheme://host[:port], without a path",
        )


class Guard:
    """ASGI middleware. ``keys``: API keys or hashes of them; empty: nobody needs one."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        keys: Sequence[str] = (),
        body_timeout_s: float = 60.0,
    ):
        self.app = app
        self.body_timeout_s = body_timeout_s
        self.max_body_bytes = max_body_bytes
        self.keys = KeyRing(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        refusal = None
        known = self._known(headers)
        # The engine shares its slots out between those it can tell apart.
        scope[CLIENT] = known or ""
        if self.keys and scope["path"] not in OPEN_PATHS and known is None:
            refusal = ApiError(
                401,
                "The API key is missing or wrong: send 'Authorization: Bearer <key>'.",
                kind="authentication_error",
                code="invalid_api_key",
            )
        elif self._declared(headers) > self.max_body_bytes:
            refusal = self._too_large()
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        seen, ended = 0, False
        until = asyncio.get_running_loop().time() + self.body_timeout_s

        async def counted() -> Message:
            nonlocal seen, ended
            try:
                async with asyncio.timeout_at(None if ended else until):
                    message = await receive()
            except TimeoutError:
                text = f"The body did not come within {self.body_timeout_s:g} s."
                raise HTTPException(408, text) from None
            ended = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:  # a chunked body declares no length
                raise HTTPException(413, self._too_large().message)
            return message

        await self.app(scope, counted, send)

    def _known(self, headers: dict[bytes, bytes]) -> str | None:
        """A name for whoever has this key, None if it is no key of ours."""
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return self.keys.name_of(key.strip()) if scheme.lower() == b"bearer" else None

    @staticmethod
    def _declared(headers: dict[bytes, bytes]) -> int:
        length = headers.get(b"content-length", b"0")
        return int(length[:19]) if length.isdigit() else 0

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.max_body_bytes:,} bytes.")
