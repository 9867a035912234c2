"""Commands run where standard input, output or errors are closed."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
