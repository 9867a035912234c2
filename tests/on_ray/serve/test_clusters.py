"""Two whole clusters on one host, both with HAProxy before their ingresses."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.tiny import free_ports, wait_for

pytestmark = pytest.mark.ray

CLUSTER = """
import os, signal, sys, time
from ray import serve
from nanochat_ray.on_ray import session
from nanochat_ray.on_ray.serve import deploy
from nanochat_ray.on_ray.ports import prefer_haproxy

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Ingress:
    async def __call__(self, request):
        return {"model": f"second {os.getpid()}"}

prefer_haproxy()
session.connect()
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
deploy.deploy(Ingress.bind())
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    time.sleep(600)
except KeyboardInterrupt:
    deploy.remove()
    deploy.exit_without_ray()
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


def test_requests_stay_in_their_cluster(url: str, tmp_path: Path) -> None:
    """While the only ingress of a cluster is dead; then all of that cluster ends."""
    (port,) = free_ports(1)
    second = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(port)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(lambda: answer(second).startswith("second"), 90, "an answer of the second cluster")
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
        # The signal reaches all processes of Ray too; there is nothing left to drain.
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - start < 15
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
