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

from tests.tiny import free_ports, wait_for

pytestmark = pytest.mark.ray

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
        response = httpx.get(f"{url}/health", timeout=1)
    except httpx.TransportError:
        return ""
    if response.status_code != 200:
        return ""
    return str(response.json()["model"])


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
        wait_for(lambda: process.poll() is not None or "is served" in log.read_text(), 120, "Serve")
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
        wait_for(lambda: answer(second).startswith("second"), 60, "an answer of the second cluster")
        assert answer(url) == "tiny"
        pid = answer(second).split()[1]
        os.kill(int(pid), signal.SIGKILL)
        answers: list[str] = []

        def is_restarted() -> bool:
            answers.append(answer(second))
            return answers[-1].startswith("second") and answers[-1] != f"second {pid}"

        wait_for(is_restarted, 60, "another ingress")
        assert "" in answers
        assert {text.split(" ")[0] for text in answers} == {"", "second"}
        assert answer(url) == "tiny"
        # As a supervisor ends a service: Ray too ends at once, and there is nothing left to drain.
        processes = psutil.Process(process.pid).children(recursive=True)
        assert any(each.name() == "raylet" for each in processes)
        for each in [*processes, psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        assert process.wait(timeout=30) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert psutil.wait_procs(processes, timeout=30)[1] == []
