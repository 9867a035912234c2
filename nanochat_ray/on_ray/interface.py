"""The network interface by which the workers of a training group reach each other.

Gloo takes the one that the host's own name resolves to. That is loopback on many machines (Debian
writes ``127.0.1.1`` into /etc/hosts), and a group on several nodes then cannot connect. Ray knows
an address of each node at which the others reach it. NCCL looks for an interface by itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.train
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def interface_of(address: str) -> str:
    """Name of this host's interface that has the address; "" if none has it."""
    interfaces = psutil.net_if_addrs()
    return next((name for name in interfaces if _has(interfaces[name], address)), "")


def _has(addresses: list[Any], address: str) -> bool:
    return any(one.address == address for one in addresses)


def set_gloo_interface(address: str) -> None:
    """Lets gloo in this process use the interface that has the address, unless one is named."""
    if name := interface_of(address):
        os.environ.setdefault(GLOO_INTERFACE, name)


def _connect_nodes() -> None:
    """On a worker. On one node the group stays on loopback, which no change of network breaks."""
    context = ray.train.get_context()
    if context.get_local_world_size() < context.get_world_size():
        set_gloo_interface(ray.util.get_node_ip_address())


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_connect_nodes)
        super().on_start(worker_group, backend_config)


@dataclass
class NodeTorchConfig(TorchConfig):
    """Ray's, with the workers of several nodes at their Ray addresses."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
