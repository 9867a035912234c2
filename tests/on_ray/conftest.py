"""One Ray for all tests that need it: starting one takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    os.environ["OMP_NUM_THREADS"] = "1"
    import ray

    from nanochat_ray.on_ray.ports import prefer_haproxy

    before = dict(os.environ)
    prefer_haproxy()  # as the serve command does
    ray.init(
        address="local",
        num_cpus=8,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
    )
    for name in set(os.environ) - set(before):
        del os.environ[name]  # another cluster chooses its own ports
    yield
    ray.shutdown()
