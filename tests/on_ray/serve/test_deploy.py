"""A served application is removed, with and without its cluster."""

from __future__ import annotations

import signal
import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from nanochat_ray.on_ray import leave
from nanochat_ray.on_ray.serve import deploy


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A listener in place of Ray's control service."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(30)
    host, port = listener.getsockname()
    context = SimpleNamespace(gcs_address=f"{host}:{port}")
    monkeypatch.setattr(deploy.ray, "get_runtime_context", lambda: context)
    return listener


def replace_delete(monkeypatch: pytest.MonkeyPatch, delete: Any) -> None:
    monkeypatch.setattr(deploy.serve, "delete", delete)


def test_removal_waits_while_replicas_drain(
    gcs: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    deletions: list[str] = []

    def delete(app: str) -> None:
        for _ in range(2):  # meanwhile the cluster is looked at twice
            gcs.accept()[0].close()
        deletions.append(app)

    replace_delete(monkeypatch, delete)
    assert deploy.remove()
    assert deletions == [deploy.APP]
    gcs.close()


def test_removal_ends_with_the_cluster(gcs: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def delete(app: str) -> None:
        gcs.close()
        release.wait(60)

    replace_delete(monkeypatch, delete)
    assert not deploy.remove()
    assert not release.is_set()
    release.set()


def test_errors_count_only_while_the_cluster_lives(
    gcs: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(app: str) -> None:
        raise RayActorError

    replace_delete(monkeypatch, fail)
    monkeypatch.setattr(deploy, "GCS_END_S", 0.1)
    with pytest.raises(RayActorError):
        deploy.remove()
    gcs.close()
    assert not deploy.remove()


def test_serving_ends_with_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with its dashboard; ``--restarts`` starts it again."""
    deaths = [[("dashboard", None)], [("dashboard", None), ("gcs_server", None)]]
    node = SimpleNamespace(dead_processes=lambda: deaths.pop(0))
    monkeypatch.setattr(leave.worker, "_global_node", node)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit, match=r"^gcs_server of Ray died"):
            deploy.stay()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not deaths
