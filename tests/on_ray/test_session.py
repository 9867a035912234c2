"""A Ray that a command starts admits that command and its own processes alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat_ray.on_ray import session

pytestmark = pytest.mark.ray

START = """
import os, subprocess, sys
import ray
from nanochat_ray.on_ray.session import connect

connect()
assert ray.get(ray.remote(lambda: 7).remote()) == 7
address = ray.get_runtime_context().gcs_address
code = f"import ray; ray.init(address={address!r}); print('joined')"
command = "from nanochat_ray.on_ray.session import connect; connect(); print('joined')"
without_mode = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
processes = [
    subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for program, environment in (
        (code, os.environ),
        (command, {**without_mode, "RAY_ADDRESS": address}),
        (code, {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}),
    )
]
print("with", "joined" in processes[0].communicate(timeout=120)[0])
print("a command that has the token alone", "joined" in processes[1].communicate(timeout=120)[0])
try:
    joins = "joined" in processes[2].communicate(timeout=4)[0]
except subprocess.TimeoutExpired:  # a process that is refused tries again for 20 s
    processes[2].kill()
    processes[2].wait()
    joins = False
print("without", joins)
"""


def test_a_process_without_a_token_is_refused() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
    process = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=240
    )
    lines = ["with True", "a command that has the token alone True", "without False"]
    assert process.stdout.splitlines() == lines, process.stderr


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for room without a word."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(session, "cluster_address", lambda: "local")
    monkeypatch.setattr(session, "joins_cluster", lambda: False)
    monkeypatch.setattr(session.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3 << 20))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"^{tmp_path} has 3 MiB free, and Ray needs 50 there"):
        session.connect()


def test_an_unreachable_cluster_is_named_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens, a listener stays silent, or the value is no address."""
    monkeypatch.setattr(session, "REACHABLE_S", 0.5)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray may run
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("", 0)) as closing:
        silent_port, unused_port = silent.getsockname()[1], closing.getsockname()[1]
        closing.close()
        for address in (
            *(f"127.0.0.1:{silent_port}", f"127.0.0.1:{unused_port}"),
            *(f"ray://127.0.0.1:{unused_port}", "nohost.invalid:6379"),
        ):
            monkeypatch.setenv("RAY_ADDRESS", address)
            start = time.monotonic()
            with pytest.raises(ConnectionError, match="does not answer") as caught:
                session.connect()
            assert time.monotonic() - start < 10
            assert address in str(caught.value)
    for address in ("localhost", "http://127.0.0.1:8265", "a:b"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match="RAY_ADDRESS="):
            session.connect()


def test_a_job_joins_the_cluster_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray names the machine's latest cluster to a job, whichever cluster runs it.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("NANOCHAT_RAY_ADDRESS", "127.0.0.1:2")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert session.cluster_address() == "127.0.0.1:1"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert session.cluster_address() == "127.0.0.1:2"
    monkeypatch.delenv("NANOCHAT_RAY_ADDRESS")
    assert session.cluster_address() == "127.0.0.1:1"
