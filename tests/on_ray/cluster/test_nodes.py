"""The cluster that the other tests of this folder use."""

from __future__ import annotations

import sys

import pytest

from tests.on_ray.cluster.nodes import Nodes

pytestmark = pytest.mark.cluster

LIST_NODES = """
import json, ray
from nanochat_ray.on_ray.session import connect

connect()
print(json.dumps(sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])))
"""


def test_every_node_has_its_own_address(nodes: Nodes) -> None:
    environment = {"RAY_ADDRESS": nodes.gcs_address}
    output = nodes.run(nodes.nodes[1], [sys.executable, "-c", LIST_NODES], environment)
    addresses = ", ".join(f'"{node.address}"' for node in nodes.nodes)
    assert output.splitlines()[-1] == f"[{addresses}]"
    assert all(node.processes(r"\S*/raylet ") for node in nodes.nodes)
