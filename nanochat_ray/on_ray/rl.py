"""Reinforcement learning on Ray: the trainer by Ray Train, answers by a ``Fleet``."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.on_ray.fleet import Fleet, RemoteEngine, actor_engines, endpoint_engines
from nanochat_ray.on_ray.fleet_engine import EngineSpec
from nanochat_ray.on_ray.train import fit
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.parent import tokenizer_run
from nanochat_ray.rl.source import RolloutSource
from nanochat_ray.train.config import TrainerConfig


def engine_spec(config: TrainerConfig, engine: EngineConfig) -> EngineSpec:
    """Of the engines of one command."""
    return EngineSpec(
        owner=uuid.uuid4().hex,
        model=config.model,
        tokenizer_run=tokenizer_run(config).uri,
        config=engine,
    )


def _make_source(
    rl: RLConfig,
    spec: EngineSpec,
    make_engines: Callable[[], Sequence[RemoteEngine]],
    config: TrainerConfig,
) -> RolloutSource:
    return RolloutSource(config, rl, spec.config, lambda *_: Fleet(make_engines(), spec))


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
    with contextlib.ExitStack() as stack:
        if endpoint:
            make_engines = functools.partial(endpoint_engines, endpoint)
        else:
            actors = stack.enter_context(actor_engines(engines, gpus=gpus, threads=threads))
            make_engines = functools.partial(list, actors)
        make_source = functools.partial(_make_source, rl, engine_spec(config, engine), make_engines)
        return fit(config, gpus=gpus, threads=threads, make_source=make_source, **fit_options)
