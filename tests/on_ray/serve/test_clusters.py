"""Two whole clusters on one host, both with HAProxy before their ingresses."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from nanochat_ray.bench.drill import matches
from tests.processes import have_ended
from tests.tiny import free_ports
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(800)]

CLUSTER = """
import os, sys
from dataclasses import dataclass
from ray import serve
from nanochat_ray.cli import entry
from nanochat_ray.on_ray import session
from nanochat_ray.on_ray.ports import prefer_haproxy
from nanochat_ray.on_ray.serve import deploy

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Ingress:
    async def __call__(self, request):
        return {"model": f"second {os.getpid()}"}

@dataclass
class Args:
    port: int

def main(args):
    prefer_haproxy()
    session.connect()
    print("Ray is up", flush=True)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    deploy.deploy(Ingress.bind())
    print("is served", flush=True)
    deploy.stay()

entry.run(main, Args, None)
"""


def answer(url: str) -> str:
    """Who answers a request with success, else nothing."""
    try:
        # No longer: the gap between two ingresses is to be seen.
        response = httpx.get(f"{url}/health", timeout=1)
    except httpx.TransportError:
        return ""
    if response.status_code != 200:
        return ""
    return str(response.json()["model"])


def is_answered_by_the_first(url: str) -> bool:
    text = answer(url)
    assert text in ("", "tiny")
    return bool(text)


@contextlib.contextmanager
def second_cluster(port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ``CLUSTER`` once it has deployed; its log goes with a failure."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, "--port", str(port)],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    processes = [psutil.Process(process.pid)]
    try:
        wait_for(lambda: process.poll() is not None or "is served" in log.read_text(), 240, "Serve")
        assert process.poll() is None
        yield process
    except BaseException as error:
        error.add_note(log.read_text()[-8000:])
        raise
    finally:
        with contextlib.suppress(psutil.Error):
            processes += processes[0].children(recursive=True)
        for each in processes:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait()


def test_requests_stay_in_their_cluster(url: str, tmp_path: Path) -> None:
    """While the only ingress of a cluster is dead; then all processes of that cluster end."""
    (port,) = free_ports(1)
    second = f"http://127.0.0.1:{port}"
    with second_cluster(port, tmp_path / "log") as process:
        answers: list[str] = []

        def is_from_another_than(ingress: str) -> bool:
            answers.append(answer(second))
            return answers[-1].startswith("second") and answers[-1] != ingress

        wait_for(lambda: is_from_another_than(""), 120, "an answer of the second one")
        victim = answers[-1]
        wait_for(lambda: is_answered_by_the_first(url), 120, "an answer of the first one")
        os.kill(int(victim.split()[1]), signal.SIGKILL)
        answers.clear()
        wait_for(lambda: is_from_another_than(victim), 180, "another ingress")
        assert "" in answers
        assert {text.split(" ")[0] for text in answers} == {"", "second"}
        wait_for(lambda: is_answered_by_the_first(url), 120, "an answer of the first one")
        # As a supervisor ends a service: Ray too ends at once, and there is nothing left to drain.
        processes = psutil.Process(process.pid).children(recursive=True)
        assert any(matches(each, r"\S*/raylet ") for each in processes)
        for each in [*processes, psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        assert process.wait(timeout=120) == 0
        wait_for(lambda: have_ended(processes), 60, "the end of its processes")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
