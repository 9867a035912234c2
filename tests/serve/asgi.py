"""Calls ASGI applications as a server does, without one."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Scope


def http(path: str = "/v1/models", method: str = "POST", **headers: str) -> Scope:
    """A scope; underscores in the names of headers stand for hyphens."""
    raw_headers = [
        (name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()
    ]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": raw_headers,
    }


def call(app: ASGIApp, scope: Scope, *parts: bytes) -> list[Message]:
    """What ``app`` sends for a request whose body comes in ``parts``; a body never ends without
    one."""
    messages: list[Message] = []
    rest = list(parts)

    async def receive() -> Message:
        if not rest:
            await asyncio.Event().wait()
        part = rest.pop(0)
        # ASGI: without ``more_body`` a part is the last.
        return {"type": "http.request", "body": part} | ({"more_body": True} if rest else {})

    async def send(message: Message) -> None:
        messages.append(message)

    asyncio.run(app(scope, receive, send))
    return messages
