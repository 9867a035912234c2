"""Joins a Ray cluster or starts one: the same way for every command."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from typing import TYPE_CHECKING

import grpc
import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import services

from nanochat_ray.checks import require
from nanochat_ray.on_ray import own_node
from nanochat_ray.on_ray.leave import keep_sigterm_handler, own_session

if TYPE_CHECKING:
    from nanochat_ray.train.hardware import Hardware

REACHABLE_S = 5.0
"""How long the cluster of RAY_ADDRESS may take to answer."""
MIN_TEMP_BYTES = 50 << 20
"""Of disk for the files of a Ray and the state of its control service (GCS), 27 MB at first, and
its logs."""
_has_connected = _started_here = False


def connect() -> None:
    """Joins the cluster that this process was submitted to or RAY_ADDRESS names, else starts one.

    SIGTERM keeps its handler; without one it raises KeyboardInterrupt. End the process by
    ``leave.leave``.

    A cluster that is started here lasts as long as the process, which ends when the cluster is
    lost (``own_node``). It has at least 8 logical CPUs, so that tasks of Ray Data run beside
    training workers. Its ports bind every interface and require a token (``RAY_AUTH_MODE``), which
    this process and its children have. Raises ValueError or ConnectionError if the cluster of
    RAY_ADDRESS cannot be joined.
    """
    global _has_connected, _started_here
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
            _has_connected = True
            with keep_sigterm_handler():
                ray.init(address=address, logging_level=logging.WARNING)
        else:
            _check_temp_space()
            # Ray requires tokens by default, and writes one of its own to a file that all can read.
            if os.environ.get("RAY_AUTH_MODE", "token") == "token":
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            own_node.store_state()
            _has_connected = _started_here = True
            with keep_sigterm_handler(), own_session():
                ray.init(
                    address="local",
                    num_cpus=max(8, os.cpu_count() or 1),
                    object_store_memory=500 << 20,
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                )
            own_node.watch()


def has_connected() -> bool:
    """Whether ``connect`` has joined or started a cluster."""
    return _has_connected


def has_started_ray() -> bool:
    """Whether ``connect`` has started a cluster, which ends with this process."""
    return _started_here


def _is_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def cluster_address() -> str:
    """RAY_ADDRESS; in a job of a ``local_cluster`` the address of that one. Ray tells a
    job the address in /tmp/ray/ray_current_cluster, which is the machine's latest cluster's."""
    own = os.environ.get("NANOCHAT_RAY_ADDRESS", "") if _is_job() else ""
    return own or os.environ.get("RAY_ADDRESS", "")


def joins_cluster() -> bool:
    """Whether ``connect`` joins a running cluster; else it starts one."""
    return cluster_address() not in ("", "local") or ray.is_initialized() or _is_job()


def _head_address(address: str) -> str:
    """The address of the head node; for "" or auto, that of this machine's cluster."""
    if address not in ("", "auto"):
        return address
    head = services.canonicalize_bootstrap_address("auto")
    if head is None:
        raise ConnectionError(f"RAY_ADDRESS={address!r}: no Ray runs on this machine")
    return head


def _check_temp_space() -> None:
    """ValueError if there is no room for the files of a Ray, which would wait for it without a
    word."""
    folder = get_default_system_temp_dir()
    with contextlib.suppress(FileNotFoundError):  # Ray makes it
        free = shutil.disk_usage(folder).free
        if free < MIN_TEMP_BYTES:
            raise ValueError(
                f"{folder} has {free >> 20} MiB free, and Ray needs {MIN_TEMP_BYTES >> 20} there: "
                "make room, or name another folder with TMPDIR"
            )


def _check_reachable(address: str) -> None:
    """Raises ConnectionError within seconds if nothing at ``address`` speaks gRPC; ray.init would
    try for minutes."""
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
    """Raises ValueError if GPUs are required of a cluster that was started here and has none.

    Other clusters may scale up; Ray waits for those.
    """
    if number and _started_here and not ray.cluster_resources().get("GPU"):
        raise ValueError(f"gpus={number:g} is not allowed: this machine has no CUDA device")


def detect_gpu() -> Hardware:
    """The GPU of a worker of the cluster, which may first have to start one."""
    import torch  # which only some commands need

    from nanochat_ray.train import hardware

    detect = ray.remote(num_cpus=0, num_gpus=1)(hardware.detect)
    gpu: Hardware = ray.get(detect.remote(torch.device("cuda")))
    return gpu


def quiet_data() -> None:
    """Keeps the progress bars and plans of Ray Data out of the log of a job. To be called before
    Ray Data or Ray Train runs."""
    # Not above: it takes as long to import as Ray, and a server does not need it.
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Errors only: Ray Data warns that its bars are off.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
