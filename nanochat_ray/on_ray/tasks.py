"""``data.map_tasks.MapTasks`` by Ray Data: one task on the cluster for each item of a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.data

from nanochat_ray.data.map_tasks import TaskResult, Work, parse_result, run_task
from nanochat_ray.on_ray.session import quiet_data


def num_cores() -> int:
    """Tasks that run at once. A local Ray may be told of more CPUs than the machine has."""
    nodes = max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    total = int(ray.cluster_resources().get("CPU", 1))
    return max(1, min(total - 1, nodes * (os.cpu_count() or 1)))


def map_tasks(plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
    """``MapTasks`` on the cluster that this process is connected to."""

    def run(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"result": np.asarray([run_task(work, batch["item"][0])])}

    quiet_data()
    pool = ray.data.TaskPoolStrategy(size=min(num_cores(), len(plan)))
    items = [{"item": json.dumps(item)} for item in plan]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    for row in data.map_batches(run, batch_size=1, compute=pool).iter_rows():
        yield parse_result(row["result"])
