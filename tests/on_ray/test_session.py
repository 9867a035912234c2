"""A Ray that a job starts by itself is open to that job alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

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
for name, token in (("with", {}), ("without", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""})):
    joining = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **token},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        joined = "joined" in joining.communicate(timeout=60 if name == "with" else 8)[0]
    except subprocess.TimeoutExpired:  # who is refused tries again for 20 s
        joining.kill()
        joining.wait()
        joined = False
    print(name, joined)
"""


def test_who_has_no_token_cannot_join() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_A")}
    done = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.stdout.splitlines() == ["with True", "without False"], done.stderr


def test_a_cluster_that_is_gone_is_named_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens; what listens says nothing; what is named is no address."""
    monkeypatch.setattr(session, "REACHABLE_S", 0.5)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray may run
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("", 0)) as gone:
        silent_port, gone_port = silent.getsockname()[1], gone.getsockname()[1]
        gone.close()
        for address in (
            *(f"127.0.0.1:{silent_port}", f"127.0.0.1:{gone_port}"),
            *(f"ray://127.0.0.1:{gone_port}", "nohost.invalid:6379"),
        ):
            monkeypatch.setenv("RAY_ADDRESS", address)
            began = time.monotonic()
            with pytest.raises(ConnectionError, match="does not answer") as caught:
                session.connect()
            assert time.monotonic() - began < 10
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
