"""Reinforcement learning on Ray: the trainer by Ray Train, rollouts by actors or an endpoint.

Weights go through the object store, once for each step and rank, and every call names their
version. A rollout is a pure function of its request and the weights, so requests may run on any
engine and more than once: when an engine dies, its requests run on the others, with the same
tokens.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.request import EngineStoppedError, Request
from nanochat_ray.on_ray.rollout_engine import RolloutEngine
from nanochat_ray.on_ray.serve.endpoints import CALL_ERRORS
from nanochat_ray.on_ray.train import fit
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.rollout import Rollout
from nanochat_ray.rl.source import RolloutSource
from nanochat_ray.train.config import TrainerConfig

CHUNKS_PER_ENGINE = 2
"""Calls of a round for each engine: a fast one takes more of them."""
RESTART_DEADLINE_S = 180.0
"""How long rollouts wait while no engine is alive."""
POLL_S = 1.0
LOST = (RayActorError, EngineStoppedError)
"""What a call raises whose engine has died or ends: another engine may take it."""


class RemoteEngine(Protocol):
    def generate(self, version: int, weights: Sequence[Any], requests: Sequence[Any]) -> list[Any]:
        """``RolloutEngine.generate``; one of LOST if the engine dies."""
        ...

    def is_ready(self) -> bool:
        """Whether it answers within ``POLL_S``."""
        ...


class ActorEngine:
    """A ``RolloutEngine``, which Ray restarts when it dies."""

    def __init__(self, actor: Any):
        self.actor = actor

    def generate(self, version: int, weights: Sequence[Any], requests: Sequence[Any]) -> list[Any]:
        rollouts: list[Any] = ray.get(self.actor.generate.remote(version, weights, requests))
        return rollouts

    def is_ready(self) -> bool:
        try:
            ray.get(self.actor.ping.remote(), timeout=POLL_S)
        except (*LOST, GetTimeoutError):
            return False
        return True


class EndpointEngine:
    """A replica of a Serve application, another one in each call: Serve chooses."""

    def __init__(
        self,
        application: str,
        handle: DeploymentHandle,
        config: TrainerConfig,
        engine: EngineConfig,
    ):
        """``handle``: of the application's engines. All engines of a fleet share one, which knows
        how many calls each replica has."""
        self.application, self._handle = application, handle
        self._run = config, engine

    def generate(self, version: int, weights: Sequence[Any], requests: Sequence[Any]) -> list[Any]:
        call = self._handle.generate_rollouts.remote(*self._run, version, weights, requests)

        while True:
            try:
                rollouts: list[Any] = call.result(timeout_s=10 * POLL_S)
                return rollouts
            except TimeoutError as error:
                if isinstance(error, RayTaskError):
                    raise  # by the replica, not by this wait
                # Rollouts may wait for users for as long as they like.
                num_replicas(self.application)

    def is_ready(self) -> bool:
        try:
            self._handle.status.remote().result(timeout_s=POLL_S)
        except CALL_ERRORS:
            return False
        return True


def num_replicas(application: str) -> int:
    """Of the engines of a Serve application. ValueError if it does not run."""
    applications = serve.status().applications
    if application not in applications:
        others = ", ".join(applications) or "none"
        raise ValueError(
            f"endpoint={application!r} is no Serve application here; there is {others}"
        )
    engines = applications[application].deployments.get("engine")
    if engines is None:
        raise ValueError(f"endpoint={application!r} is no application of nanochat-ray serve")
    return max(1, sum(engines.replica_states.values()))


class Fleet:
    """Implements ``rl.rollout.RolloutGenerator``; each rank of the trainer has one."""

    def __init__(self, engines: Sequence[RemoteEngine]):
        self._engines = list(engines)
        self._idle: queue.SimpleQueue[RemoteEngine] = queue.SimpleQueue()
        for engine in engines:
            self._idle.put(engine)
        self._times_of_death: dict[RemoteEngine, float] = {}
        """Of engines that have not come back."""
        self._version = -1
        self._weights: Any = None
        self.num_lost_engines = 0

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        if version != self._version:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in weights.items()}
            self._weights, self._version = ray.put(arrays), version

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        size = max(1, -(-len(requests) // (CHUNKS_PER_ENGINE * len(self._engines))))
        chunks = [requests[first : first + size] for first in range(0, len(requests), size)]
        # Not longer than this call: a thread of its own would start a Ray when there is none.
        end = threading.Event()
        reviver = threading.Thread(target=self._revive, args=(end,), name="reviver")
        reviver.start()
        try:
            with ThreadPoolExecutor(len(self._engines), "rollouts") as pool:
                return [rollout for part in pool.map(self._run, chunks) for rollout in part]
        finally:
            end.set()
            reviver.join()

    def _run(self, requests: Sequence[Request]) -> list[Rollout]:
        wires = [request.to_wire() for request in requests]
        while True:
            engine = self._next_engine()
            try:
                answers = engine.generate(self._version, [self._weights], wires)
            except LOST:
                self.num_lost_engines += 1
                self._times_of_death[engine] = time.monotonic()
                continue
            except BaseException:
                self._idle.put(engine)  # it lives, and other threads wait for one
                raise
            self._idle.put(engine)
            rollouts = [Rollout.from_wire(wire) for wire in answers]
            assert all(rollout.version == self._version for rollout in rollouts)
            return rollouts

    def _next_engine(self) -> RemoteEngine:
        while True:
            try:
                return self._idle.get(timeout=POLL_S)
            except queue.Empty:
                times = list(self._times_of_death.values())
                if len(times) < len(self._engines):
                    continue  # one of the others is busy
                if time.monotonic() - max(times) > RESTART_DEADLINE_S:
                    raise RuntimeError(
                        f"all {len(times)} rollout engines have died, and none has come back "
                        f"within {RESTART_DEADLINE_S:.0f} s"
                    ) from None

    def _revive(self, end: threading.Event) -> None:
        """Until ``end``, gives engines that are back their turns again."""
        while not end.wait(POLL_S / 5):
            for engine in list(self._times_of_death):
                if engine.is_ready():
                    del self._times_of_death[engine]
                    self._idle.put(engine)


def endpoint_fleet(application: str, config: TrainerConfig, engine: EngineConfig) -> Fleet:
    """An engine for each replica of a Serve application. ValueError if it does not run."""
    count = num_replicas(application)
    handle = serve.get_deployment_handle("engine", application)
    return Fleet([EndpointEngine(application, handle, config, engine) for _ in range(count)])


def start_engines(
    config: TrainerConfig, engine: EngineConfig, *, count: int, gpus: bool, threads: int
) -> list[Any]:
    """Handles of ``count`` actors, which Ray restarts when they die."""
    actor = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0, max_restarts=-1)(RolloutEngine)
    return [actor.remote(config, engine, gpus, threads) for _ in range(count)]


def _make_source(
    rl: RLConfig, engine: EngineConfig, endpoint: str, actors: Sequence[Any], config: TrainerConfig
) -> RolloutSource:
    def make_fleet(*_: Any) -> Fleet:
        if not endpoint:
            return Fleet([ActorEngine(actor) for actor in actors])
        return endpoint_fleet(endpoint, config, engine)

    return RolloutSource(config, rl, engine, make_fleet)


def fit_rl(
    config: TrainerConfig,
    rl: RLConfig,
    engine: EngineConfig,
    *,
    engines: int,
    endpoint: str = "",
    gpus: bool = False,
    threads: int = 1,
    **fit_options: Any,
) -> dict[str, Any]:
    """Trains ``config`` (as ``preflight.check_run`` returned it) with the rollouts of ``engines``
    actors, or of the replicas of the Serve application ``endpoint``. The other options, and what it
    returns, are those of ``on_ray.train.fit``."""
    actors = []
    if not endpoint:
        actors = start_engines(config, engine, count=engines, gpus=gpus, threads=threads)
    make_source = functools.partial(_make_source, rl, engine, endpoint, actors)
    try:
        return fit(config, gpus=gpus, threads=threads, make_source=make_source, **fit_options)
    finally:
        for actor in actors:
            ray.kill(actor)
