"""Drains a node of Ray before its pod or machine ends: the preStop hook in ``k8s``.

    python -m nanochat_ray.on_ray.drain_node --seconds 75
    python -m nanochat_ray.on_ray.drain_node --seconds 90 --save-seconds 60

Serve starts replacements on other nodes, then stops the replicas of this one; their requests finish
here or continue on another replica (``serve/client.py``). A training run saves a checkpoint and
goes on, so its workers get a fixed time for that; a node without any ends at once.
"""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import ray

from nanochat_ray.checks import check_float

REPLICA = re.compile(r"ray::ServeReplica")
TRAIN_WORKER = re.compile(r"ray::.*RayTrainWorker")
"""What the command lines of their processes begin with."""
POLL_S = 0.5


def num_processes(title: re.Pattern[str]) -> int:
    """Processes of this container whose command line begins with ``title``."""
    count = 0
    for process in psutil.process_iter():
        try:
            count += title.match("".join(process.cmdline()[:1])) is not None
        except psutil.Error:
            continue
    return count


def wait_until_none(seconds: float, count: Callable[[], int]) -> bool:
    """Whether ``count`` is 0 within ``seconds``."""
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
    parser.add_argument(
        "--save-seconds", type=float, default=0, help="for training workers to save (default 0)"
    )
    parser.add_argument("--node", default="", help="its id (default: the node of this container)")
    args = parser.parse_args(arguments)
    seconds: float = args.seconds
    save_seconds: float = args.save_seconds
    check_float("seconds", seconds)
    check_float("save_seconds", save_seconds)
    began = time.monotonic()
    drain(seconds, args.node)
    if not wait_until_none(seconds - (time.monotonic() - began), lambda: num_processes(REPLICA)):
        print(f"drain_node: replicas still run after {seconds:g} s", flush=True)
    remaining = save_seconds - (time.monotonic() - began)
    wait_until_none(remaining, lambda: num_processes(TRAIN_WORKER))


if __name__ == "__main__":
    main()
