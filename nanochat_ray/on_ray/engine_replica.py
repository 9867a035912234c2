"""The engine side of Serve: one ``EngineLoop``, and one stream to each ingress.

The event loop of a replica only moves messages; the model runs in the engine's own thread, which
hands over each step's outputs with one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgpack
from ray import serve

from nanochat_ray.checkpoint import snapshot
from nanochat_ray.config import EngineConfig, from_json
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.request import EngineFull, Output, Request
from nanochat_ray.engine.tools import calculator_tool
from nanochat_ray.on_ray.metrics import RaySink
from nanochat_ray.on_ray.routing import ACCEPTED, NOT_HERE, QUEUE_FULL
from nanochat_ray.serve.metrics import EngineMetrics
from nanochat_ray.storage import Store

# An ingress asks for the status every second; one that is silent for so long has died.
INGRESS_SILENCE_S = 30.0
METRICS_S = 0.9
"""Figures go to Ray's metrics at most so often."""


class Outlet:
    """What waits to be sent to one ingress, and the requests that it has here."""

    def __init__(self) -> None:
        self.requests: dict[str, EngineLoop] = {}
        self.seen = time.monotonic()
        self._waiting: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, output: Output) -> None:
        self._waiting.append(output.to_wire())
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """All that waits, as one message; steps that pile up behind a slow reader go together."""
        yield msgpack.packb([])  # says that the connection stands
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._closed:
                return
            waiting, self._waiting = self._waiting, []
            if waiting:
                yield msgpack.packb(waiting)


class EngineReplica:
    """One model in one process.

    Which snapshot is in ``user_config``, so that another is swapped in place: the old engine ends
    what it has begun while the new one takes what comes.
    """

    def __init__(
        self,
        storage: str,
        run: str,
        engine: dict[str, Any],
        device: str,
        threads: int,
        name: str = "",
        model: str = "",
    ):
        self.run = Store.at(storage).child("runs", run)
        self.config = from_json(EngineConfig, engine)
        self.device = device
        self.threads = threads
        self.name = name or serve.get_replica_context().replica_tag
        self.snapshot = ""
        self.tokenizer = ""
        self.engine: EngineLoop | None = None
        self.outlets: dict[str, Outlet] = {}
        self.owners: dict[str, Outlet] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._metrics = EngineMetrics(RaySink(model or self.name))
        self._told = 0.0

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        name = user_config["snapshot"]
        if name == self.snapshot:
            return
        loop = asyncio.get_running_loop()
        fresh = await asyncio.to_thread(self._start, name, loop)
        old, self.engine, self.snapshot = self.engine, fresh, name
        if old is not None:
            task = asyncio.ensure_future(self._retire(old))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _start(self, name: str, loop: asyncio.AbstractEventLoop) -> EngineLoop:
        import torch

        torch.set_num_threads(self.threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.config.precision]
        model, tokenizer = snapshot.load_model(self.run, name, device=self.device, dtype=dtype)
        if self.tokenizer not in ("", tokenizer.fingerprint):
            raise ValueError(f"snapshot={name!r} has another tokenizer than {self.snapshot!r}")
        self.tokenizer = tokenizer.fingerprint
        engine = Engine(model, self.config, calculator_tool(tokenizer))

        def on_step(outputs: list[Output]) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(self._deliver, outputs)

        engine_loop = EngineLoop(engine, on_step)
        engine_loop.start()
        return engine_loop

    async def _retire(self, engine: EngineLoop) -> None:
        while any(engine in outlet.requests.values() for outlet in self.outlets.values()):
            await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.stop)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            outlet = self.owners.get(output.request_id)
            if outlet is None:
                continue  # aborted while the step ran
            if output.finish is not None:
                self._forget(output.request_id)
            outlet.put(output)

    def _forget(self, request: str) -> EngineLoop | None:
        outlet = self.owners.pop(request, None)
        return outlet.requests.pop(request) if outlet is not None else None

    def _drop(self, ingress: str) -> None:
        """Ends an ingress's stream and its requests."""
        outlet = self.outlets.pop(ingress, None)
        if outlet is not None:
            outlet.close()
            self._abort(list(outlet.requests))

    def _abort(self, requests: Sequence[str]) -> None:
        for request in requests:
            engine = self._forget(request)
            if engine is not None:
                engine.abort(request)

    async def connect(self, *, ingress: str, replica: str) -> AsyncGenerator[bytes, None]:
        """Outputs for ``ingress`` as MessagePack lists, each of all that came since the last; the
        first is empty. The ingress's requests end with the stream."""
        if replica != self.name:
            return
        self._drop(ingress)
        outlet = self.outlets[ingress] = Outlet()
        try:
            async for message in outlet.messages():
                yield message
        finally:
            if self.outlets.get(ingress) is outlet:
                self._drop(ingress)

    async def submit(self, *, ingress: str, replica: str, request: bytes) -> str:
        """Takes a request whose tokens then come on the ingress's stream. ValueError: refused."""
        outlet = self.outlets.get(ingress)
        if replica != self.name or outlet is None or self.engine is None:
            return NOT_HERE
        found = Request.from_wire(msgpack.unpackb(request))
        self.owners[found.id] = outlet
        outlet.requests[found.id] = self.engine
        try:
            self.engine.submit(found)
        except EngineFull:
            self._forget(found.id)
            return QUEUE_FULL
        except ValueError:
            self._forget(found.id)
            raise
        except RuntimeError:  # it is dead: Serve will see that too, and replace this replica
            self._forget(found.id)
            return NOT_HERE
        return ACCEPTED

    async def abort(self, *, replica: str, requests: list[str]) -> None:
        if replica == self.name:
            self._abort(requests)

    async def status(self, *, ingress: str = "") -> dict[str, Any]:
        """Who this is and how busy; also a sign that ``ingress`` is alive."""
        now = time.monotonic()
        if ingress in self.outlets:
            self.outlets[ingress].seen = now
        for name, outlet in list(self.outlets.items()):
            if now - outlet.seen > INGRESS_SILENCE_S:
                self._drop(name)
        stats = dataclasses.asdict(self.engine.stats()) if self.engine is not None else {}
        if now - self._told > METRICS_S:
            self._told = now
            self._metrics.put(self.name, stats)
        return {
            "replica": self.name,
            "snapshot": self.snapshot,
            "requests": len(self.owners),
            **stats,
        }

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine thread has died."""
        if self.engine is None or self.engine.failure is not None:
            reason = "not started" if self.engine is None else self.engine.failure
            raise RuntimeError(f"the engine is dead: {reason}")

    async def __del__(self) -> None:
        for name in list(self.outlets):
            self._drop(name)
        if self.engine is not None:
            with contextlib.suppress(RuntimeError):
                await asyncio.to_thread(self.engine.stop)
