"""An engine in this process behind the client's interface: for tests, notebooks and plain uvicorn.

    engine, tokenizer = engine_from_run(run, EngineConfig())
    client = LocalClient(engine)
    uvicorn.run(build_app(client, tokenizer, "my-model", client.max_model_len))

``client.close()`` ends the engine's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.request import EngineStoppedError, Request, RequestOutput
from nanochat_ray.serve.client import OutputStream, UnavailableError


class LocalClient:
    """Owns the engine. ``submit`` must be called in one event loop."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.follow_status: Callable[[], dict[str, Any]] | None = None
        """Of the thread that swaps the weights, if there is one."""
        self.max_model_len = engine.max_model_len
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, OutputStream] = {}
        self._engine_loop = EngineLoop(engine, self._on_step)
        self._engine_loop.start()

    async def submit(self, request: Request, stream: OutputStream) -> None:
        self._loop = asyncio.get_running_loop()
        if compiling := self._engine_loop.prepare(request):
            await asyncio.shield(asyncio.wrap_future(compiling))  # others may wait for it too

        def abort() -> None:
            self._streams.pop(request.id, None)
            self._engine_loop.abort(request.id)

        self._streams[request.id] = stream
        stream.take(request.id, abort)
        try:
            self._engine_loop.submit(request)
        except BaseException as error:
            del self._streams[request.id]
            stream.drop(request.id)
            if isinstance(error, EngineStoppedError):
                raise UnavailableError(str(error)) from error
            raise

    @property
    def weight_version(self) -> str:
        return self._engine_loop.weight_version

    async def health(self) -> dict[str, Any]:
        if self._engine_loop.failure is not None:
            raise UnavailableError(self._engine_loop.failure)
        stats = dataclasses.asdict(self._engine_loop.stats())
        health = {"engines": [{"weight_version": self.weight_version, **stats}]}
        return health if self.follow_status is None else {**health, "follow": self.follow_status()}

    def swap_weights(
        self, weights: Mapping[str, Tensor], version: str, drain_s: float
    ) -> Future[None]:
        """``EngineLoop.swap_weights``."""
        return self._engine_loop.swap_weights(weights, version, drain_s)

    def close(self) -> None:
        self._engine_loop.stop()

    def _on_step(self, outputs: list[RequestOutput]) -> None:  # in the engine's thread
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the server has ended, and its event loop with it
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            has_ended = output.finish is not None
            stream = (self._streams.pop if has_ended else self._streams.get)(
                output.request_id, None
            )
            if stream is not None:
                stream.push(output)
