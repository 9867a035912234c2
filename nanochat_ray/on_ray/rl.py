"""Reinforcement learning on Ray: engines as actors, the trainer by Ray Train.

Weights go through the object store, once for each step and rank, and every call names their
version. A rollout is a pure function of its request and the weights, so requests may run on any
engine and more than once: when an engine dies, its requests run on the others, with the same
tokens.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.precision import checkpoint_dtype
from nanochat_ray.engine.request import Request
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray.train import fit
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.rollout import EngineGenerator, Rollout
from nanochat_ray.rl.source import RolloutSource, load_tokenizer
from nanochat_ray.train.config import TrainerConfig

CHUNKS_PER_ENGINE = 2
"""Calls of a round for each engine: a fast one takes more of them."""
RESTART_DEADLINE_S = 180.0
"""How long rollouts wait while no engine is alive."""


class RolloutEngine:
    """An actor with one engine."""

    def __init__(self, config: TrainerConfig, engine: EngineConfig, gpu: bool, threads: int):
        torch.set_num_threads(threads)
        model = GPT(config.model, compute_dtype=checkpoint_dtype(engine.precision))
        model.to("cuda" if gpu else "cpu").eval().requires_grad_(False)
        self._generator = EngineGenerator.of_model(model, load_tokenizer(config), engine)

    def ping(self) -> None:
        """Returns when the engine is ready."""

    def generate(self, version: int, weights: list[Any], requests: list[Any]) -> list[Any]:
        """Rollouts in wire form; ``weights`` holds one reference, read if they are new here."""
        if self._generator.version != version:
            with warnings.catch_warnings():  # the store's arrays are read-only, and only read
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                arrays = ray.get(weights[0])
                tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
                self._generator.load(version, tensors)
        rollouts = self._generator.generate([Request.from_wire(wire) for wire in requests])
        return [rollout.to_wire() for rollout in rollouts]


class Fleet:
    """Implements ``rl.rollout.Generator`` on actors; each rank of the trainer has one."""

    def __init__(self, engines: Sequence[Any]):
        self._engines = list(engines)
        self._version = -1
        self._weights: Any = None
        self.num_lost_engines = 0

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        if version != self._version:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in weights.items()}
            self._weights, self._version = ray.put(arrays), version

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        size = max(1, -(-len(requests) // (CHUNKS_PER_ENGINE * len(self._engines))))
        chunks = deque(range(0, len(requests), size))
        rollouts: dict[int, list[Rollout]] = {}
        idle = list(self._engines)
        running: dict[Any, tuple[Any, int]] = {}
        restarting: dict[Any, Any] = {}
        deadline = time.monotonic() + RESTART_DEADLINE_S
        while chunks or running:
            while chunks and idle:
                engine, first = idle.pop(0), chunks.popleft()
                wires = [request.to_wire() for request in requests[first : first + size]]
                call = engine.generate.remote(self._version, [self._weights], wires)
                running[call] = engine, first
            calls, _ = ray.wait([*running, *restarting], num_returns=1, timeout=1.0)
            for call in calls:
                if call in restarting:
                    engine = restarting.pop(call)
                    if _succeeds(call):
                        idle.append(engine)
                    else:
                        restarting[engine.ping.remote()] = engine
                    continue
                engine, first = running.pop(call)
                try:
                    rollouts[first] = [self._check(wire) for wire in ray.get(call)]
                    idle.append(engine)
                except RayActorError:
                    self.num_lost_engines += 1
                    chunks.append(first)
                    restarting[engine.ping.remote()] = engine
            if running or idle:
                deadline = time.monotonic() + RESTART_DEADLINE_S
            elif time.monotonic() > deadline:
                raise RuntimeError(
                    f"all {len(self._engines)} rollout engines have died, and none has come back "
                    f"within {RESTART_DEADLINE_S:.0f} s"
                )
        return [rollout for first in sorted(rollouts) for rollout in rollouts[first]]

    def _check(self, wire: Sequence[Any]) -> Rollout:
        rollout = Rollout.from_wire(wire)
        assert rollout.version == self._version, (rollout.version, self._version)
        return rollout


def _succeeds(call: Any) -> bool:
    try:
        ray.get(call)
    except RayActorError:
        time.sleep(0.2)  # not once more at once: the machine may be gone
        return False
    return True


def start_engines(
    config: TrainerConfig, engine: EngineConfig, *, count: int, gpus: bool, threads: int
) -> list[Any]:
    """Handles of ``count`` actors, which Ray restarts when they die."""
    actor = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0, max_restarts=-1)(RolloutEngine)
    return [actor.remote(config, engine, gpus, threads) for _ in range(count)]


def _make_source(
    rl: RLConfig, engine: EngineConfig, engines: Sequence[Any], config: TrainerConfig
) -> RolloutSource:
    return RolloutSource(config, rl, engine, lambda *_: Fleet(engines))


def fit_rl(
    config: TrainerConfig,
    rl: RLConfig,
    engine: EngineConfig,
    *,
    engines: int,
    workers: int,
    gpus: bool = False,
    threads: int = 1,
    print_every: int = 1,
    max_failures: int = 3,
) -> dict[str, Any]:
    """Trains ``config`` (as ``preflight.check_run`` returned it) on ``workers`` ranks with the
    rollouts of ``engines`` actors; returns as ``on_ray.train.fit``."""
    handles = start_engines(config, engine, count=engines, gpus=gpus, threads=threads)
    try:
        return fit(
            config,
            workers=workers,
            gpus=gpus,
            threads=threads,
            print_every=print_every,
            max_failures=max_failures,
            make_source=functools.partial(_make_source, rl, engine, handles),
        )
    finally:
        for handle in handles:
            ray.kill(handle)
