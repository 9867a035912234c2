"""Runs any number of requests on an engine that the caller steps, outside a server."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.request import Request, RequestOutput


def run_requests(engine: Engine, requests: Iterable[Request]) -> Iterator[RequestOutput]:
    """The outputs of ``requests`` as they come, until all are complete.

    ``requests`` is read only as far as the engine's queue has room. Nobody else may use the engine
    meanwhile. ValueError for a request that cannot run (``Engine.validate``).
    """
    return itertools.chain.from_iterable(run_steps(engine, requests))


def run_steps(
    engine: Engine, requests: Iterable[Request]
) -> Generator[list[RequestOutput], None, None]:
    """As ``run_requests``, the outputs of one step at a time. If it is closed before its end, the
    engine is left without requests."""
    source = iter(requests)
    request = next(source, None)
    try:
        while request is not None or engine.has_work:
            while request is not None and engine.scheduler.queue_capacity > 0:
                engine.add(request)
                request = next(source, None)
            yield engine.step()
    finally:
        engine.reset()
