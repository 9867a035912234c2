"""How many engine replicas a deployment needs, from the load of each.

Serve's controller calls ``policy`` several times a second, clips the result to the configured
minimum and maximum, and acts when it has stayed the same for a while (``ServeConfig``). The
controller gets ``policy`` by value and may lack this project: nothing of it is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ray.serve.config import AutoscalingContext

MAX_SLOT_USAGE = 0.9
"""Share of a replica's slots, waiting requests included, from which on it counts as full: the rest
takes new requests while another replica starts."""
MAX_KV_USAGE = 0.7
"""The same of its KV cache. Less, since running sequences still grow, and a step costs the more the
longer they are."""
DOWNSCALE_USAGE = 0.6
"""A replica is removed where the others would then be at most this full, on average. The gap to 1
keeps the number from oscillating under a steady load."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The load of one replica, averaged over the look-back period."""

    running: float
    waiting: float
    slots: float
    kv_cache_usage: float
    """Share of its KV cache."""

    @property
    def fullness(self) -> float:
        """1 is as much load as the replica should have."""
        requests = (self.running + self.waiting) / (self.slots * MAX_SLOT_USAGE)
        return max(requests, self.kv_cache_usage / MAX_KV_USAGE)


def target_num_replicas(loads: Sequence[Load], num_replicas: int) -> int:
    """How many replicas there should be, where there are ``num_replicas`` now."""
    work = sum(load.fullness for load in loads)
    lower, upper = math.ceil(work), math.ceil(work / DOWNSCALE_USAGE)
    return max(lower, min(num_replicas, upper), 1)


def policy(context: AutoscalingContext) -> tuple[int, dict]:
    """Serve's interface; the metrics are those of ``EngineReplica.record_autoscaling_stats``. A
    replica without metrics has no work yet."""
    metrics = context.aggregated_metrics or {}
    names = ("running", "waiting", "slots", "kv_cache_usage")
    loads = [
        Load(**{name: metrics[name][replica] for name in names})
        for replica in metrics.get("slots", {})
    ]
    # Starting replicas count, so that they are not requested a second time.
    return target_num_replicas(loads, context.target_num_replicas), {}
