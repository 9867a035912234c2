"""The interface of an engine to the HTTP side, wherever the engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from nanochat_ray.engine.request import Request, RequestOutput


class UnavailableError(Exception):
    """No engine could accept or continue the request before the deadline."""


class OutputStream:
    """Outputs of the requests of one reader: ``async for outputs in stream``.

    Each iteration yields all outputs since the last one, of any of its requests: a step of the
    engine wakes the reader once, and a slow reader gets fewer, larger lists. It ends when every
    request has had an output with ``finish``. Call ``take``, ``push`` and ``fail`` in the event
    loop that reads. ``close`` aborts the requests that still run; it may be called repeatedly.
    """

    def __init__(self) -> None:
        self._aborts: dict[str, Callable[[], None]] = {}
        self._waiting: list[RequestOutput] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def take(self, request_id: str, abort: Callable[[], None]) -> None:
        """Registers a request whose outputs will come here; ``abort`` ends it early."""
        self._aborts[request_id] = abort

    def drop(self, request_id: str) -> None:
        """Removes a request that the engine rejected."""
        self._aborts.pop(request_id, None)

    def push(self, output: RequestOutput) -> None:
        self._waiting.append(output)
        if output.finish is not None:
            self._aborts.pop(output.request_id, None)
        self._wake()

    def fail(self, request_id: str, error: Exception) -> None:
        """Raises ``error`` in the reader after the outputs before it."""
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
        """Aborts one request: its answer is complete for the reader."""
        abort = self._aborts.pop(request_id, None)
        if abort is not None:
            abort()

    def close(self) -> None:
        for request_id in list(self._aborts):
            self.abort(request_id)


class EngineClient(Protocol):
    """An engine, local or remote; tests replace it by a double."""

    async def submit(self, request: Request, stream: OutputStream) -> None:
        """Submits a request; its outputs come on the stream.

        Raises EngineFull, UnavailableError, WeightsReplacedError, or ValueError for a
        request that the engine rejects.
        """
        ...

    @property
    def weight_version(self) -> str:
        """The weights that a new request gets (``Engine.weight_version``); "" if unknown."""
        ...

    async def health(self) -> dict[str, Any]:
        """Statistics of the engines. Raises UnavailableError if none answers."""
        ...
