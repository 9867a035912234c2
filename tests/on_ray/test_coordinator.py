"""Ray's autoscaling coordinator, which outlives the node of a worker."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanochat_ray.on_ray.coordinator import NAME, hold_coordinator

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class Coordinator:
    """In place of Ray's, on a node that is lost."""


def coordinator() -> Any:
    return ray.get_actor(NAME, namespace=NAME)


def test_one_of_a_lost_node_is_replaced() -> None:
    with contextlib.suppress(ValueError):
        ray.kill(coordinator())
    elsewhere = NodeAffinitySchedulingStrategy("e" * 56, soft=False)
    ray.remote(num_cpus=0, max_restarts=-1)(Coordinator).options(
        name=NAME, namespace=NAME, lifetime="detached", scheduling_strategy=elsewhere
    ).remote()
    hold_coordinator()
    first = coordinator()
    ray.get(first.__ray_ready__.remote(), timeout=60)
    hold_coordinator()
    assert coordinator()._actor_id == first._actor_id
