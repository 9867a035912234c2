"""The engines of a ``Fleet``: an actor, or a guest of a replica that serves.

Every call names the engine and the weights that it is for, and where the object store has these. An
engine reads them if they are new to it.
"""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.offline import LocalEngine, whole_outputs
from nanochat_ray.engine.precision import checkpoint_dtype
from nanochat_ray.engine.request import EngineStoppedError, Request, RequestOutput
from nanochat_ray.machine import run_in_temporary_thread
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store

IDLE_S = 600.0
"""How long a guest stays after its last call."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What an engine is made of, but for the weights."""

    owner: str
    """Names the command: versions of weights are unique within it."""
    model: ModelConfig
    tokenizer_run: str
    """URI of a run that has the tokenizer."""
    config: EngineConfig

    def make(self, device: str) -> LocalEngine:
        """Warm, but with no weights before the first call."""
        tokenizer = checkpoint.load_tokenizer(Store.at(self.tokenizer_run))
        model = GPT(self.model, compute_dtype=checkpoint_dtype(self.config.precision))
        model.to(device).eval().requires_grad_(False)
        engine = LocalEngine.from_model(model, tokenizer, self.config)
        engine.warm_up()
        return engine


def read_weights(weights: Sequence[Any]) -> dict[str, Tensor]:
    """``weights`` holds one reference to arrays by name, which are not copied."""
    with warnings.catch_warnings():  # the store's arrays are read-only, and only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: torch.from_numpy(array) for name, array in ray.get(weights[0]).items()}


class FleetEngine:
    """An actor with one engine."""

    def __init__(self, gpu: bool, threads: int):
        torch.set_num_threads(threads)
        self._device = "cuda" if gpu else "cpu"
        self._spec: EngineSpec | None = None
        self._engine: LocalEngine | None = None

    def ping(self) -> None:
        """Returns when the actor is ready."""

    def run(
        self, spec: EngineSpec, version: int, weights: Sequence[Any], wires: Sequence[Any]
    ) -> list[Any]:
        """The whole output of each request, in any order; requests and outputs in wire form."""
        if self._engine is None or self._spec != spec:
            self._engine = None  # its memory is free before the next one takes its own
            self._engine, self._spec = spec.make(self._device), spec
        if self._engine.version != version:
            self._engine.load(version, read_weights(weights))
        requests = [Request.from_wire(wire) for wire in wires]
        return [output.to_wire() for output in self._engine.run(requests)]


class GuestEngine:
    """An engine on the thread of one that serves, in the time that its requests leave
    (``engine.background``). It has weights, keys and values of its own, so that what is served
    does not change. One command at a time: another one takes its place once no call of the first
    runs."""

    def __init__(self, device: str):
        self._device = device
        self._owner: tuple[EngineLoop, EngineSpec] | None = None
        """Whose thread steps the engine, for which command."""
        self._engine: LocalEngine | None = None
        self._turn = asyncio.Lock()  # fair: no command waits for ever behind the calls of another
        self._versions: list[int] = []
        """Of the calls that run."""
        self._idle = asyncio.Event()
        """Set while no call runs."""
        self._idle.set()
        self._timer: asyncio.TimerHandle | None = None

    async def run(
        self,
        host: EngineLoop | None,
        spec: EngineSpec,
        version: int,
        weights: Sequence[Any],
        wires: Sequence[Any],
    ) -> list[Any]:
        """As ``FleetEngine.run``. EngineStoppedError if the ``host`` ends or has not started."""
        if host is None:
            raise EngineStoppedError("the engine has not started")
        requests = [Request.from_wire(wire) for wire in wires]
        async with self._turn:
            await self._prepare(host, spec)
            job = await self._submit(host, version, weights, requests)
        steps: list[list[RequestOutput]] = await asyncio.wrap_future(job)
        outputs = whole_outputs(itertools.chain.from_iterable(steps))
        return [output.to_wire() for output in outputs]

    async def _prepare(self, host: EngineLoop, spec: EngineSpec) -> None:
        owner = host, spec
        if self._owner == owner:
            return
        await self._idle.wait()
        self.leave()  # its memory is free before the next one takes its own
        self._engine = await asyncio.to_thread(run_in_temporary_thread, spec.make, self._device)
        self._owner = owner

    async def _submit(
        self, host: EngineLoop, version: int, weights: Sequence[Any], requests: Sequence[Request]
    ) -> Future[list[Any]]:
        engine = self._engine
        assert engine is not None
        # Jobs run in the order of their submission: one of another version changes the weights.
        has_weights = engine.version == version and set(self._versions) <= {version}
        self._begin_call(version)
        try:
            tensors = {} if has_weights else await asyncio.to_thread(read_weights, weights)
            job = host.run_in_background(engine.steps(version, tensors, requests))
        except BaseException:
            self._end_call(version)
            raise
        # Not when ``run`` ends: if it is cancelled, a job that has begun still runs.
        loop = asyncio.get_running_loop()
        job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._end_call, version))
        return job

    def _begin_call(self, version: int) -> None:
        self._versions.append(version)
        self._idle.clear()
        self._stop_timer()

    def _end_call(self, version: int) -> None:
        self._versions.remove(version)
        if not self._versions:
            self._idle.set()
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self.leave)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def is_here(self) -> bool:
        return self._engine is not None

    def leave(self) -> None:
        """Frees its memory until the next call. Not while a call runs."""
        self._stop_timer()
        self._engine = self._owner = None
