"""How many engines are wanted, from what each of them has to do.

Serve's controller asks ``policy`` several times a second, clips its answer to the least and most
engines that are allowed, and waits until it has stayed the same for a while (``ServeConfig``).
The controller gets ``policy`` by value and may lack this project: nothing of it is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ray.serve.config import AutoscalingContext

FULL_SLOTS = 0.9
"""Share of an engine's slots, with those who wait counted in, from which on it is full: the rest
takes what comes while another engine starts."""
FULL_KV = 0.7
"""The same of its KV cache. Less, since answers that have a slot still grow, and a step costs the
more the longer its sequences are."""
IDLE = 0.6
"""An engine is given up where the others would then be at most this full, on average. The gap to 1
keeps a steady load from going to and fro."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one engine has to do, averaged over the last while."""

    running: float
    waiting: float
    slots: float
    kv_used: float
    """Share of its KV cache."""

    @property
    def fullness(self) -> float:
        """1: as much as it should have."""
        requests = (self.running + self.waiting) / (self.slots * FULL_SLOTS)
        return max(requests, self.kv_used / FULL_KV)


def wanted(loads: Sequence[Load], engines: int) -> int:
    """How many engines there should be, where there are ``engines`` now."""
    work = sum(load.fullness for load in loads)
    least, most = math.ceil(work), math.ceil(work / IDLE)
    return max(least, min(engines, most), 1)


def policy(context: AutoscalingContext) -> tuple[int, dict]:
    """Serve's side of it: ``EngineReplica.record_autoscaling_stats`` says what comes here. An
    engine that has not said anything yet has nothing to do yet."""
    told = context.aggregated_metrics or {}
    loads = [
        Load(**{name: told[name][replica] for name in ("running", "waiting", "slots", "kv_used")})
        for replica in told.get("slots", {})
    ]
    # Those that start just now are counted, or they would be wanted a second time.
    return wanted(loads, context.target_num_replicas), {}
