"""A served application is removed, with and without its cluster."""

from __future__ import annotations

import io
import itertools
import signal
import socket
import threading
from concurrent import futures
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

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


def test_a_signal_ends_serving_with_status_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when Ray dies with it."""
    is_leaving = threading.Event()
    monkeypatch.setattr(deploy, "is_leaving", is_leaving)
    sleeps = iter([None, None, signal.SIGTERM])
    monkeypatch.setattr(
        deploy.time, "sleep", lambda seconds: (n := next(sleeps)) and signal.raise_signal(n)
    )
    monkeypatch.setattr(deploy, "remove", lambda: not is_leaving.is_set())
    calls: list[tuple[int, bool]] = []
    monkeypatch.setattr(deploy, "leave", lambda status, shutdown: calls.append((status, shutdown)))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        deploy.stay()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert calls == [(0, False)]


class Controllers:
    """Whether Serve's controller exists, at one look after another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: bool):
        self.answers = list(answers)
        monkeypatch.setattr(deploy.ray, "get_actor", self.get_actor)

    def get_actor(self, name: str, namespace: str) -> None:
        assert (name, namespace) == ("SERVE_CONTROLLER_ACTOR", "serve")
        if not self.answers.pop(0):
            raise ValueError("no actor")


def test_the_controller_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "CONTROLLER_POLL_S", 0.001)
    looks = Controllers(monkeypatch, False, False, True, True)
    serve_start: futures.Future[None] = futures.Future()
    deploy.wait_for_controller(serve_start)
    assert looks.answers == [True]
    serve_start.set_result(None)
    Controllers(monkeypatch, False)
    deploy.wait_for_controller(serve_start)
    failure: futures.Future[None] = futures.Future()
    failure.set_exception(RuntimeError("no proxy"))
    Controllers(monkeypatch, False)
    with pytest.raises(RuntimeError, match="no proxy"):
        deploy.wait_for_controller(failure)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        Controllers(monkeypatch, False, True)
        with pytest.raises(ValueError, match=f"port={port} on 127.0.0.1 is not available"):
            deploy.check_port_is_free("127.0.0.1", port)
        deploy.check_port_is_free("127.0.0.1", port)  # a running Serve has it
    Controllers(monkeypatch, False)
    deploy.check_port_is_free("127.0.0.1", 0)


def test_the_endpoint_must_serve_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.time, "sleep", lambda seconds: None)
    answers: list[Any] = [OSError("refused"), b"no JSON", b'{"model": "other"}', b'{"model": "m"}']

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url == "http://h:1/health"
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(deploy.urllib.request, "urlopen", urlopen)
    deploy.wait_until_up("http://h:1", "m")
    for answer, state in ((b'{"model": "other"}', "it serves 'other'"), (OSError("no"), "no")):
        answers[:] = [answer]
        times = itertools.count(start=0.0, step=0.4)  # two looks in a second
        monkeypatch.setattr(deploy.time, "monotonic", lambda times=times: next(times))
        with pytest.raises(ValueError, match=rf"does not serve 'm' \({state}\); does Serve"):
            deploy.wait_until_up("http://h:1", "m", seconds=1.0)


@pytest.mark.parametrize(
    ("is_removed", "starts_ray", "status"),
    [(True, False, None), (False, False, 0), (True, True, 0)],
)
def test_a_signal_removes_the_application(
    monkeypatch: pytest.MonkeyPatch, is_removed: bool, starts_ray: bool, status: int | None
) -> None:
    """The process ends with its Ray, if it has one of its own or Ray is gone."""
    calls: list[tuple[int, bool]] = []
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(deploy, "leave", lambda status, shutdown: calls.append((status, shutdown)))
    monkeypatch.setattr(deploy.session, "has_started_ray", lambda: starts_ray)

    def remove() -> bool:
        assert calls == []
        signal.raise_signal(signal.SIGINT)  # a second one does not wait for the removal
        assert calls.pop() == (0, False)
        return is_removed

    monkeypatch.setattr(deploy, "remove", remove)
    monkeypatch.setattr(deploy.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    try:
        deploy.stay()
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert calls == ([] if status is None else [(status, False)])
