"""What the HTTP side needs of an engine, wherever that engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from nanochat_ray.engine.request import Request, RequestOutput


class UnavailableError(Exception):
    """No engine could take the request, or carry it on, before the deadline."""


class OutputStream:
    """Outputs of the requests of one reader: ``async for outputs in stream``.

    Each turn gives all that came since the last one, for whichever of its requests, so a step of
    the engine wakes the reader once, and a slow reader gets fewer, larger turns. It ends when every
    request has had an output with ``finish``. ``take``, ``push`` and ``fail`` belong to the event
    loop that reads. ``close`` at any time, as often as one likes: what still runs is aborted.
    """

    def __init__(self) -> None:
        self._aborts: dict[str, Callable[[], None]] = {}
        self._waiting: list[RequestOutput] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def take(self, request_id: str, abort: Callable[[], None]) -> None:
        """A request begins whose outputs will come here; ``abort`` ends it early."""
        self._aborts[request_id] = abort

    def drop(self, request_id: str) -> None:
        """The request was refused: nothing of it will come."""
        self._aborts.pop(request_id, None)

    def push(self, output: RequestOutput) -> None:
        self._waiting.append(output)
        if output.finish is not None:
            self._aborts.pop(output.request_id, None)
        self._wake()

    def fail(self, request_id: str, error: Exception) -> None:
        """The reader gets ``error`` after what came before it."""
        self._error = self._error or error
        self._aborts.pop(request_id, None)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> list[RequestOutput]:
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if not self._aborts:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        outputs, self._waiting = self._waiting, []
        return outputs

    def abort(self, request_id: str) -> None:
        """Ends one request: its answer is complete for the reader."""
        abort = self._aborts.pop(request_id, None)
        if abort is not None:
            abort()

    def close(self) -> None:
        for request_id in list(self._aborts):
            self.abort(request_id)


class EngineClient(Protocol):
    """The one thing that tests may replace by a double."""

    async def submit(self, request: Request, stream: OutputStream) -> None:
        """Hands a request over; its tokens come on the stream.

        Raises EngineFull, UnavailableError, or ValueError for a request that the engine refuses.
        """
        ...

    async def health(self) -> dict[str, Any]:
        """Figures of the engines. Raises UnavailableError if none answers."""
        ...
