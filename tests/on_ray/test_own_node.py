"""The control service (GCS) of a command's own Ray may die and come back, and nothing else does;
without the node the command ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat_ray.on_ray import leave, own_node
from tests.waiting import wait_for

COMMAND = """
import os
import ray
from ray._private import worker
from nanochat_ray.on_ray import leave, own_node, session
from tests.waiting import wait_for

@ray.remote(num_cpus=0)
class Counter:
    calls = 0

    def count(self):
        self.calls += 1
        return self.calls

own_node.RESTART_S = 0.0
session.connect()
detached = Counter.options(name="counter", namespace="x", lifetime="detached").remote()
other = Counter.remote()
ray.get([detached.count.remote(), other.count.remote()])
address = ray.get_runtime_context().gcs_address

def gcs_servers():
    services = worker._global_node.all_processes
    return [info.process for info in services.get("gcs_server", ())]

for number in (2, 3):
    (gcs,) = gcs_servers()
    gcs.kill()
    print(ray.get(other.count.remote()) == 2 * number - 2)
    wait_for(lambda: gcs_servers() not in ([], [gcs]), what="another GCS")
    same = ray.get_actor("counter", namespace="x")
    print(ray.get(same.count.remote()) == number, ray.get(other.count.remote()) == 2 * number - 1)
    print(ray.get(Counter.remote().count.remote()) == 1)
print(ray.get_runtime_context().gcs_address == address)
print(os.environ[own_node.PATH], flush=True)
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


GCS, RAYLET = "gcs_server", "raylet"


class Node:
    """The services of this process's own Ray, in place of a real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.dead: list[str] = []
        self.num_restarts = 0
        self.statuses: list[int] = []
        self.is_leaving = threading.Event()
        self._stores = True
        node = SimpleNamespace(
            dead_processes=lambda: [(name, None) for name in [*self.dead, "dashboard"]],
            kill_gcs_server=lambda check_alive: None,
            start_gcs_server=self._start,
            _is_rocksdb_gcs=lambda: self._stores,
        )
        monkeypatch.setattr(own_node.worker, "_global_node", node)
        monkeypatch.setattr(leave, "is_leaving", self.is_leaving)
        monkeypatch.setattr(leave, "end", self._end)
        monkeypatch.setattr(own_node, "POLL_S", 0.001)
        monkeypatch.setattr(own_node, "CONFIRM_S", 0.001)

    def store_nothing(self) -> None:
        self._stores = False

    def _start(self) -> None:
        self.num_restarts += 1
        self.dead.remove(GCS)

    def _end(self, status: int) -> None:
        self.statuses.append(status)
        self.is_leaving.set()


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    one = Node(monkeypatch)
    own_node.watch()
    yield one
    one.is_leaving.set()
    wait_for(lambda: all(t.name != "own-node" for t in threading.enumerate()), what="its end")


def test_a_control_service_that_dies_again_soon_ends_the_command(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.dead.append(GCS)
    wait_for(lambda: node.num_restarts == 1, what="a restart")
    node.dead.append(GCS)
    wait_for(lambda: node.statuses, what="the end")
    assert (node.num_restarts, node.statuses) == (1, [1])
    first, second = capsys.readouterr().err.splitlines()
    assert first == "the control service (GCS) of Ray died: started again"
    assert second == "gcs_server of Ray died: this command ends"


def test_a_control_service_is_started_again_later(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_node, "RESTART_S", 0.0)
    for number in (1, 2):
        node.dead.append(GCS)
        wait_for(lambda number=number: node.num_restarts == number, what="a restart")
    assert not node.statuses


@pytest.mark.parametrize("dead", [[RAYLET], [GCS, RAYLET]])
def test_a_command_ends_with_its_node(
    node: Node, capsys: pytest.CaptureFixture[str], dead: list[str]
) -> None:
    node.dead += dead
    wait_for(lambda: node.statuses, what="the end")
    assert (node.num_restarts, node.statuses) == (0, [1])
    assert f"{' and '.join(dead)} of Ray died: this command ends" in capsys.readouterr().err


def test_a_control_service_without_storage_ends_the_command(node: Node) -> None:
    node.store_nothing()
    node.dead.append(GCS)
    wait_for(lambda: node.statuses, what="the end")
    assert (node.num_restarts, node.statuses) == (0, [1])


def test_a_command_that_leaves_keeps_its_status(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever signals all processes of a machine may end Ray first."""
    monkeypatch.setattr(own_node, "CONFIRM_S", 60.0)
    node.dead.append(RAYLET)
    node.is_leaving.set()
    wait_for(lambda: all(t.name != "own-node" for t in threading.enumerate()), what="its end")
    assert not node.statuses


def test_a_storage_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(own_node.STORAGE, "memory")
    monkeypatch.delenv(own_node.PATH, raising=False)
    own_node.store_state()
    assert os.environ[own_node.STORAGE] == "memory"
    assert own_node.PATH not in os.environ


def test_the_state_of_a_killed_process_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, lock = own_node._new_folder()
    os.close(lock)  # as the kernel does
    alive, lock = own_node._new_folder()
    (tmp_path / f"{own_node.PREFIX}new").mkdir()  # another process is making it
    own_node._remove_orphans()
    assert not Path(dead).exists()
    assert sorted(tmp_path.iterdir()) == sorted([Path(alive), tmp_path / f"{own_node.PREFIX}new"])
    os.close(lock)
