"""Engines that sample for a run of reinforcement learning: an actor, or a guest of a replica.

Every call names the version of the weights and where the object store has them. An engine reads
them if they are new to it.
"""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import ray
import torch
from torch import Tensor

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.precision import checkpoint_dtype
from nanochat_ray.engine.request import Request, RequestOutput
from nanochat_ray.machine import run_in_temporary_thread
from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl.rollout import EngineGenerator, join_outputs
from nanochat_ray.rl.source import load_tokenizer
from nanochat_ray.train.config import TrainerConfig

IDLE_S = 600.0
"""How long a guest stays after its last call."""


def make_generator(config: TrainerConfig, engine: EngineConfig, device: str) -> EngineGenerator:
    """Its weights come with the first call."""
    model = GPT(config.model, compute_dtype=checkpoint_dtype(engine.precision))
    model.to(device).eval().requires_grad_(False)
    return EngineGenerator.of_model(model, load_tokenizer(config), engine)


def read_weights(weights: Sequence[Any]) -> dict[str, Tensor]:
    """``weights`` holds one reference to arrays by name, which are not copied."""
    with warnings.catch_warnings():  # the store's arrays are read-only, and only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: torch.from_numpy(array) for name, array in ray.get(weights[0]).items()}


class RolloutEngine:
    """An actor with one engine."""

    def __init__(self, config: TrainerConfig, engine: EngineConfig, gpu: bool, threads: int):
        torch.set_num_threads(threads)
        self._generator = make_generator(config, engine, "cuda" if gpu else "cpu")

    def ping(self) -> None:
        """Returns when the engine is ready."""

    def generate(self, version: int, weights: Sequence[Any], requests: Sequence[Any]) -> list[Any]:
        """Rollouts in wire form."""
        if self._generator.version != version:
            self._generator.load(version, read_weights(weights))
        rollouts = self._generator.generate([Request.from_wire(wire) for wire in requests])
        return [rollout.to_wire() for rollout in rollouts]


class GuestEngine:
    """An engine on the thread of one that serves, in the time that its requests leave
    (``engine.background``). It has weights, keys and values of its own, so that what is served
    does not change. One run at a time: another one takes its place once no call of the first
    runs."""

    def __init__(self, device: str):
        self._device = device
        self._owner: tuple[EngineLoop, TrainerConfig, EngineConfig] | None = None
        """Whose thread steps the generator, for which run."""
        self._generator: EngineGenerator | None = None
        self._turn = asyncio.Lock()  # fair: no run waits for ever behind the calls of another
        self._versions: list[int] = []
        """Of the calls that run."""
        self._idle = asyncio.Event()
        """Set while no call runs."""
        self._idle.set()
        self._timer: asyncio.TimerHandle | None = None

    async def generate(
        self,
        host: EngineLoop,
        config: TrainerConfig,
        engine: EngineConfig,
        version: int,
        weights: Sequence[Any],
        wires: Sequence[Any],
    ) -> list[Any]:
        """As ``RolloutEngine.generate``. EngineStoppedError if the ``host`` ends."""
        requests = [Request.from_wire(wire) for wire in wires]
        async with self._turn:
            await self._prepare(host, config, engine)
            job = await self._submit(host, version, weights, requests)
        steps: list[list[RequestOutput]] = await asyncio.wrap_future(job)
        outputs = itertools.chain.from_iterable(steps)
        return [rollout.to_wire() for rollout in join_outputs(requests, outputs, version)]

    async def _prepare(self, host: EngineLoop, config: TrainerConfig, engine: EngineConfig) -> None:
        owner = host, config, engine
        if self._owner == owner:
            return
        await self._idle.wait()
        self.leave()  # its memory is free before the next one takes its own
        self._generator = await asyncio.to_thread(
            run_in_temporary_thread, make_generator, config, engine, self._device
        )
        self._owner = owner

    async def _submit(
        self, host: EngineLoop, version: int, weights: Sequence[Any], requests: Sequence[Request]
    ) -> Future[list[Any]]:
        generator = self._generator
        assert generator is not None
        # Jobs run in the order of their submission: one of another version changes the weights.
        has_weights = generator.version == version and set(self._versions) <= {version}
        self._begin_call(version)
        try:
            tensors = {} if has_weights else await asyncio.to_thread(read_weights, weights)
            job = host.run_in_background(generator.steps(version, tensors, requests))
        except BaseException:
            self._end_call(version)
            raise
        # Not when ``generate`` ends: if it is cancelled, a job that has begun still runs.
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
        return self._generator is not None

    def leave(self) -> None:
        """Frees its memory until the next call. Not while a call runs."""
        self._stop_timer()
        self._generator = self._owner = None
