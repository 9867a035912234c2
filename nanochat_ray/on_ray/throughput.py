"""Training throughput, measured where Ray will train: as many workers, at the same time."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from datetime import timedelta
from typing import Any

import ray
import torch

from nanochat_ray.config import to_json
from nanochat_ray.train import throughput
from nanochat_ray.train.throughput import Probe, Throughput


class _Worker:
    def address(self) -> tuple[str, int]:
        """Where this worker, as the first of a group, can be reached."""
        host = ray.util.get_node_ip_address()
        with contextlib.closing(socket.create_server(("", 0))) as free:
            return host, free.getsockname()[1]

    def measure(
        self, values: dict[str, Any], rank: int, hosts: list[str], port: int
    ) -> dict[str, Any]:
        probe = Probe.from_json(values)
        torch.set_num_threads(probe.threads)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://{hosts[0]}:{port}",
            rank=rank,
            world_size=len(hosts),
            timeout=timedelta(seconds=120),
        )
        try:
            return dataclasses.asdict(throughput.measure(probe, sharing=hosts.count(hosts[rank])))
        except ValueError as error:  # Ray would wrap it in its trace
            return {"error": str(error)}


def measure(probe: Probe, *, workers: int, cpus_per_worker: float = 1.0) -> Throughput:
    """``train.throughput.measure`` in a group of ``workers`` on the cluster. Raises ValueError."""
    actor = ray.remote(num_cpus=cpus_per_worker)(_Worker)
    group: list[Any] = [actor.remote() for _ in range(workers)]
    try:
        addresses = ray.get([worker.address.remote() for worker in group])
        hosts, port, values = [host for host, _ in addresses], addresses[0][1], to_json(probe)
        speeds = ray.get(
            [worker.measure.remote(values, i, hosts, port) for i, worker in enumerate(group)]
        )
    finally:
        for worker in group:
            ray.kill(worker)
    for each in speeds:
        if "error" in each:
            raise ValueError(each["error"])
    return Throughput(**speeds[0])
