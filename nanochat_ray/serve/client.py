"""What the HTTP side needs of an engine, wherever that engine runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from nanochat_ray.engine.request import Output, Request


class UnavailableError(Exception):
    """No engine could take the request, or carry it on, before the deadline."""


class OutputStream:
    """Outputs of one request, for one reader: ``async for outputs in stream``.

    Each turn gives all that came since the last one, so a slow reader gets fewer, larger turns.
    It ends after an output with ``finish``. ``push`` and ``fail`` belong to the event loop that
    reads. ``close`` at any time, as often as one likes; if the request still runs, it is aborted.
    """

    def __init__(self, abort: Callable[[], None]):
        self._abort: Callable[[], None] | None = abort
        self._waiting: list[Output] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._ended = False

    def push(self, output: Output) -> None:
        self._waiting.append(output)
        if output.finish is not None:
            self._abort = None
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """The reader gets ``error`` after what came before it."""
        self._error = error
        self._abort = None
        self._changed.set()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> list[Output]:
        if self._ended:
            raise StopAsyncIteration
        if not self._waiting and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        outputs, self._waiting = self._waiting, []
        if not outputs:
            self._ended = True
            assert self._error is not None
            raise self._error
        self._ended = outputs[-1].finish is not None
        return outputs

    def close(self) -> None:
        self._ended = True
        abort, self._abort = self._abort, None
        if abort is not None:
            abort()


class EngineClient(Protocol):
    """The one thing that tests may replace by a double."""

    async def submit(self, request: Request) -> OutputStream:
        """Hands a request over; its tokens come on the stream.

        Raises EngineFull, UnavailableError, or ValueError for a request that the engine refuses.
        """
        ...

    async def health(self) -> dict[str, Any]:
        """Figures of the engines. Raises UnavailableError if none answers."""
        ...
