"""A Ray that a job starts by itself is open to that job alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
