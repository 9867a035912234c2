"""Where Ray's autoscaling coordinator runs: Ray Data and elastic worker groups ask it for nodes.

Ray starts one for the whole cluster, on the node of the process that asks first, and binds it to
that node for ever. That may be a worker; once its node is lost, a group that lost a worker with it
waits for the coordinator without end.
"""

from __future__ import annotations

import contextlib
import time

import ray
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayActorError

NAME = "AutoscalingCoordinator"
REPLY_S = 5.0
"""A coordinator that has not replied by then may be busy; it is left alone."""


def hold_coordinator() -> None:
    """Starts the coordinator on this node, that of the driver, unless the cluster has one. One
    whose node is lost is replaced."""
    with contextlib.suppress(ValueError, GetTimeoutError):  # there is none; it does not reply
        actor = ray.get_actor(NAME, namespace=NAME)
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=REPLY_S)
        except (RayActorError, ActorUnschedulableError):
            ray.kill(actor)
            end = time.monotonic() + REPLY_S
            while time.monotonic() < end:  # until the cluster has forgotten its name: ValueError
                ray.get_actor(NAME, namespace=NAME)
                time.sleep(0.1)
    get_or_create_autoscaling_coordinator()
