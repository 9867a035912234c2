"""Server-sent events, and cancellation when the client disconnects.

Starlette notices a disconnect only while it sends, or not at all, depending on the version of the
server; here both kinds of response wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = "[DONE]"


def event(*data: str) -> str:
    """Each of ``data`` as one event."""
    return "".join(f"data: {one}\n\n" for one in data)


class ClientGoneError(Exception):
    """The client closed its connection."""


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``. If the client disconnects, cancels it and raises ClientGoneError."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Sends ``events`` as they come; each string has one or more whole events.

    The generator is closed before the response ends, in every case.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], headers: Mapping[str, str]):
        self.events = events
        self.status_code = 200
        self.background = None
        # "no" keeps nginx from buffering events.
        always = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.init_headers({**always, **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((sending, watch), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(OSError):  # the connection broke while sending
                    sending.result()
        finally:
            for each in (sending, watch):
                each.cancel()
            await asyncio.gather(sending, watch, return_exceptions=True)
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        async for data in self.events:
            body = data.encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
