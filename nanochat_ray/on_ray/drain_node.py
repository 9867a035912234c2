"""Drains a node of Ray before its pod or machine ends: the preStop hook in ``k8s/serve``.

    python -m nanochat_ray.on_ray.drain_node --seconds 75

Serve starts replacements on other nodes, then stops the replicas of this one; their requests finish
here or continue on another replica (``serve/client.py``).
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import ray

from nanochat_ray.checks import check_float

REPLICA = "ray::ServeReplica"
"""What the command line of a replica's process begins with."""
POLL_S = 0.5


def num_replicas() -> int:
    """Replicas of Serve in this container."""
    count = 0
    for process in psutil.process_iter():
        try:
            count += "".join(process.cmdline()[:1]).startswith(REPLICA)
        except psutil.Error:
            continue
    return count


def wait_for_replicas(seconds: float, count: Callable[[], int] = num_replicas) -> bool:
    """Whether all replicas have ended within ``seconds``."""
    deadline = time.monotonic() + seconds
    while count():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def drain(seconds: float, node: str = "") -> None:
    """Has Ray drain ``node``, by default this one, which ends after ``seconds``.

    CalledProcessError if Ray refuses.
    """
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    node = node or ray.get_runtime_context().get_node_id()
    address = ray.get_runtime_context().gcs_address
    ray.shutdown()
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--address", address, "--node-id", node]
    # The other reason, idleness, is refused while anything runs.
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod ends"]
    subprocess.run([*command, "--deadline-remaining-seconds", f"{seconds:.0f}"], check=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Drain this node of Ray.")
    parser.add_argument("--seconds", type=float, default=75, help="until it ends (default 75)")
    parser.add_argument("--node", default="", help="its id (default: the node of this container)")
    args = parser.parse_args(arguments)
    seconds: float = args.seconds
    check_float("seconds", seconds)
    began = time.monotonic()
    drain(seconds, args.node)
    if not wait_for_replicas(seconds - (time.monotonic() - began)):
        print(f"drain_node: {num_replicas()} replicas still run after {seconds:g} s", flush=True)


if __name__ == "__main__":
    main()
