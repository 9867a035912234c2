"""A command that is started again when it dies, over shells that count their starts."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest

from nanochat_ray.cli import supervise
from tests.waiting import wait_for

KILL = "kill -KILL $$"


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_DELAY_S", 0.0)


def run(folder: Path, restarts: int, script: str) -> tuple[int, int]:
    """The status, and how often the shell started; ``$n`` is the number of the start. The script's
    progress is the file ``progress``."""
    starts, progress = folder / "starts", folder / "progress"
    progress.touch()
    count = f"echo >> {starts}; n=$(wc -l < {starts}); cd {folder}; {script}"
    status = supervise.supervise(restarts, progress.read_text, ["sh", "-c", count])
    return status, len(starts.read_text().splitlines())


def test_child_that_is_killed_starts_again(tmp_path: Path) -> None:
    assert run(tmp_path, 3, f"[ $n = 3 ] || {KILL}") == (0, 3)


def test_restarts_are_bounded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, 1, KILL) == (128 + signal.SIGKILL, 2)
    assert "ended with SIGKILL: restart 1 of 1 in 0 s" in capfd.readouterr().err


def test_delays_grow_without_progress_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervise, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(supervise, "LAST_DELAY_S", 0.003)
    run(tmp_path, 5, f"[ $n != 5 ] || echo >> progress; {KILL}")
    delays = re.findall(r"in (\S+) s", capfd.readouterr().err)
    assert delays == ["0.001", "0.002", "0.003", "0.003", "0.001"]


@pytest.mark.parametrize("status", [0, 2, 75])
def test_child_that_ends_by_itself_stays_ended(tmp_path: Path, status: int) -> None:
    assert run(tmp_path, 3, f"exit {status}") == (status, 1)


def test_failure_is_repeated_only_after_progress(tmp_path: Path) -> None:
    assert run(tmp_path, 5, "exit 1") == (1, 1)
    (tmp_path / "starts").unlink()
    assert run(tmp_path, 5, "[ $n -ge 3 ] || echo >> progress; exit 1") == (1, 3)


@pytest.mark.parametrize("status", [1, 75])
def test_sigterm_is_passed_on_and_ends_restarts(tmp_path: Path, status: int) -> None:
    def terminate() -> None:
        wait_for((tmp_path / "ready").exists, 60)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    trap = f"trap 'echo >> progress; exit {status}' TERM"
    assert run(tmp_path, 3, f"{trap}; touch ready; while :; do sleep 0.02; done") == (status, 1)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("mark", "restarts", "is_child", "continues_run"),
    [
        (f"{os.getppid()}:0", None, True, False),
        (f"{os.getppid()}:1", None, True, True),
        # That of a process further up.
        ("1:1", None, False, False),
        ("1:1", "2", False, True),
        # torchrun's agent has a supervisor, its ranks have not.
        (None, "0", False, False),
        (None, "2", False, True),
        (None, None, False, False),
    ],
)
def test_who_continues_a_run(
    monkeypatch: pytest.MonkeyPatch,
    mark: str | None,
    restarts: str | None,
    is_child: bool,
    continues_run: bool,
) -> None:
    for name, value in ((supervise.MARK, mark), ("TORCHELASTIC_RESTART_COUNT", restarts)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert (supervise.is_child(), supervise.continues_run()) == (is_child, continues_run)


def test_child_knows_whether_there_was_progress(tmp_path: Path) -> None:
    script = f"echo ${{{supervise.MARK}}} >> marks; [ $n != 2 ] || echo >> progress; [ $n = 4 ]"
    assert run(tmp_path, 3, f"{script} || {KILL}") == (0, 4)
    marks = (tmp_path / "marks").read_text().split()
    assert marks == [f"{os.getpid()}:{has_progress}" for has_progress in (0, 0, 1, 1)]
