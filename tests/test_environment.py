"""cluster/environment.sh finds the checkout and makes its virtual environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.processes import REPO

PYTHON = """#!/bin/bash
# As python on a Debian without python3-venv, until that is installed ($READY).
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    [ -e "$READY" ] || exit 1
    touch "$3/has-pip" ;;
  "-m pip "*) [ -e "$(dirname "$0")/../has-pip" ] && echo "$@" >>"$PIPS" ;;
esac
"""


def checkout(tmp_path: Path) -> Path:
    """A part of one, in a folder whose name has blanks."""
    folder = tmp_path / "my files"
    (folder / "cluster").mkdir(parents=True)
    shutil.copy(REPO / "cluster" / "environment.sh", folder / "cluster")
    shutil.copy(REPO / "pyproject.toml", folder)
    return folder


def source(folder: Path, command: str, **variables: object) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; . cluster/environment.sh; {command}"
    environment = {k: v for k, v in os.environ.items() if k != "NANOCHAT_VENV"}
    environment |= {name: str(value) for name, value in variables.items()}
    argv = ["bash", "-c", script]
    return subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_cdpath_does_not_lead_away(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    (tmp_path / "other" / "cluster").mkdir(parents=True)
    result = source(folder, 'echo "$REPO"', CDPATH=tmp_path / "other")
    assert result.stdout == f"{folder}\n"


def test_an_environment_that_has_no_pip_is_made_again(tmp_path: Path) -> None:
    folder, python, pips = checkout(tmp_path), tmp_path / "python", tmp_path / "pips"
    python.write_text(PYTHON)
    python.chmod(0o755)
    variables = {"PYTHON": python, "READY": tmp_path / "ready", "PIPS": pips}
    result = source(folder, "environment dev", **variables)
    assert result.returncode == 2
    assert "no worker from a folder with blanks: NANOCHAT_VENV" in result.stderr
    variables["NANOCHAT_VENV"] = tmp_path / "venv"
    assert source(folder, "environment dev", **variables).returncode == 1
    (tmp_path / "ready").touch()
    result = source(folder, "environment dev", **variables)
    assert result.returncode == 0, result.stderr
    assert f"-m pip install -e {folder}[dev]" in pips.read_text()
    pips.unlink()
    assert source(folder, "environment dev", **variables).returncode == 0
    assert not pips.exists()  # it is there
