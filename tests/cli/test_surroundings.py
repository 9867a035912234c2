"""Commands run where standard streams are closed, and where the user has no home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_ray.cli import entry

PROGRAM = """
import os
from nanochat_ray.cli import entry
entry.open_standard_streams()
for number in range(3):
    assert os.get_inheritable(number)
print("text → anywhere", flush=True)
print("text → anywhere", file=__import__("sys").stderr, flush=True)
assert open("/dev/null").fileno() > 2
"""


@pytest.mark.parametrize("redirections", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_opened(redirections: str) -> None:
    command = f'exec "$@" {redirections}'
    argv = ["bash", "-c", command, "bash", sys.executable, "-c", PROGRAM]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0


def test_a_command_whose_output_is_closed_succeeds() -> None:
    argv = ["bash", "-c", 'exec "$@" >&-', "bash", sys.executable, "-m", "nanochat_ray", "--help"]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_user_without_a_home_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/here")
    entry.set_home()
    assert os.environ["HOME"] == "/here"

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    entry.set_home()
    assert os.environ["HOME"] == "/"
