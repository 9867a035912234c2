"""The control service (GCS) of a cluster may die and come back, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_ray.on_ray import gcs

COMMAND = """
import os
import ray
from ray._private import worker
from nanochat_ray.on_ray import gcs, leave, session
from tests.waiting import wait_for

@ray.remote(num_cpus=0)
class Counter:
    calls = 0

    def count(self):
        self.calls += 1
        return self.calls

gcs.store_state()
session.connect()
detached = Counter.options(name="counter", namespace="x", lifetime="detached").remote()
other = Counter.remote()
ray.get([detached.count.remote(), other.count.remote()])
address = ray.get_runtime_context().gcs_address
for number in (2, 3):
    worker._global_node.all_processes["gcs_server"][0].process.kill()
    wait_for(lambda: leave.dead_services() == ["gcs_server"], what="the end of the GCS")
    print(ray.get(other.count.remote()) == 2 * number - 2)
    print(gcs.restart(), leave.dead_services() == [])
    same = ray.get_actor("counter", namespace="x")
    print(ray.get(same.count.remote()) == number, ray.get(other.count.remote()) == 2 * number - 1)
    print(ray.get(Counter.remote().count.remote()) == 1)
print(ray.get_runtime_context().gcs_address == address)
print(os.environ[gcs.PATH], flush=True)
leave.leave(7)
"""


@pytest.mark.ray
def test_actors_outlive_the_control_service() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_gcs")}
    environment["RAY_AUTH_MODE"] = "disabled"
    process = subprocess.run(
        [sys.executable, "-c", COMMAND],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 7, process.stderr
    *answers, folder = process.stdout.split()
    assert set(answers) == {"True"}, process.stdout
    assert not Path(folder).exists()


def test_a_storage_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gcs.STORAGE, "memory")
    monkeypatch.delenv(gcs.PATH, raising=False)
    gcs.store_state()
    assert os.environ[gcs.STORAGE] == "memory"
    assert gcs.PATH not in os.environ
