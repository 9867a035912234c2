"""One way to reach Ray for every job."""

from __future__ import annotations

import logging
import os
import secrets

import grpc
import ray
import ray.data
from ray._private import services

from nanochat_ray.checks import require

REACHABLE_S = 5.0
"""How long a cluster that is named may take to answer."""
_started_here = False


def connect() -> None:
    """Joins the cluster that this process was submitted to or RAY_ADDRESS names, else starts one.

    A cluster of one's own lasts as long as the process and has at least 8 logical CPUs, since tasks
    of Ray Data must find a place beside training workers. Its ports bind every interface, so they
    want a token (``RAY_AUTH_MODE``), which this process has and those that it starts. Raises
    ValueError or ConnectionError if the cluster that is named cannot be joined.
    """
    global _started_here
    if not ray.is_initialized():
        address = cluster_address()
        if address.startswith("http"):
            raise ValueError(
                f"RAY_ADDRESS={address!r} is a dashboard, which takes submitted jobs only: "
                "use ray job submit, or give host:port of the head node"
            )
        if joins_cluster():
            address = _head_address(address)
            _check_reachable(address)
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            # Ray turns tokens on by itself; one that it makes would lie in a file for all to read.
            if os.environ.get("RAY_AUTH_MODE", "token") == "token":
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(
                address="local",
                num_cpus=max(8, os.cpu_count() or 1),
                object_store_memory=500 << 20,
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
            _started_here = True
    quiet_data()


def _is_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def cluster_address() -> str:
    """RAY_ADDRESS; in a job of ``cluster/local.sh``'s cluster the address of that one. Ray tells a
    job the address in /tmp/ray/ray_current_cluster, which is the machine's latest cluster's."""
    own = os.environ.get("NANOCHAT_RAY_ADDRESS", "") if _is_job() else ""
    return own or os.environ.get("RAY_ADDRESS", "")


def joins_cluster() -> bool:
    """Whether ``connect`` joins a cluster that runs; else it starts one."""
    return cluster_address() not in ("", "local") or ray.is_initialized() or _is_job()


def _head_address(address: str) -> str:
    """The address of the head node; where it is not named, that of this machine's cluster."""
    if address not in ("", "auto"):
        return address
    head = services.canonicalize_bootstrap_address("auto")
    if head is None:
        raise ConnectionError(f"RAY_ADDRESS={address!r}: no Ray runs on this machine")
    return head


def _check_reachable(address: str) -> None:
    """ConnectionError, within seconds, if nothing at ``address`` speaks gRPC: ray.init would try
    for minutes."""
    target = address.removeprefix("ray://")
    host, _, port = target.rpartition(":")
    requirement = "host:port or ray://host:port of a head node, auto or local"
    require(bool(host) and port.isdecimal(), "RAY_ADDRESS", address, requirement)
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(target, options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=REACHABLE_S)
        except grpc.FutureTimeoutError:
            raise ConnectionError(
                f"RAY_ADDRESS={address!r} does not answer within {REACHABLE_S:g} s: is the cluster "
                "gone? Unset it to start Ray here, or name a head node that runs"
            ) from None


def check_gpus(number: float) -> None:
    """ValueError if that many GPUs are wanted of a cluster that has none and cannot get any.

    Clusters that are joined may be scaling up; Ray waits for those.
    """
    if number and _started_here and not ray.cluster_resources().get("GPU"):
        raise ValueError(f"gpus={number:g} is not allowed: this machine has no CUDA device")


def quiet_data() -> None:
    """Ray Data's bars and plan dumps do not belong into the log of a job."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Only errors: that its bars are off is a warning to it.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
