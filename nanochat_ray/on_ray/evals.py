"""Evaluation on Ray: the engines of a command, each configuration of which is a ``Fleet``."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable, Iterator

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray.fleet import (
    Fleet,
    actor_engines,
    endpoint_device,
    endpoint_engines,
)
from nanochat_ray.on_ray.fleet_engine import EngineSpec
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer


@contextlib.contextmanager
def open_fleets(
    run: Store, *, engines: int, endpoint: str = "", gpus: bool = False, threads: int = 1
) -> Iterator[Callable[[GPT, Tokenizer, EngineConfig], Fleet]]:
    """Makes a fleet for a model of ``run``, whose weights are float32, on ``engines`` actors or on
    the replicas of the Serve application ``endpoint``. A call of one fleet may follow that of
    another, but not run beside it. ValueError if the application does not run."""
    owner, versions = uuid.uuid4().hex, itertools.count()
    with contextlib.ExitStack() as stack:
        if endpoint:
            remotes, device_type = endpoint_engines(endpoint), endpoint_device(endpoint)
        else:
            remotes = stack.enter_context(actor_engines(engines, gpus=gpus, threads=threads))
            device_type = "cuda" if gpus else "cpu"

        def make(model: GPT, tokenizer: Tokenizer, config: EngineConfig) -> Fleet:
            spec = EngineSpec(owner=owner, model=model.config, tokenizer_run=run.uri, config=config)
            fleet = Fleet(remotes, spec, device_type)
            fleet.load(next(versions), model.state_dict())
            return fleet

        yield make
