"""How a process that uses Ray ends: its status, and what is left of its Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nanochat_ray.bench.drill import matches
from nanochat_ray.on_ray import leave
from tests.processes import have_ended
from tests.waiting import wait_for

COMMAND = """
import threading
from dataclasses import dataclass
from nanochat_ray.cli import entry
from nanochat_ray.on_ray import session

@dataclass
class Args:
    wait: bool = True

def main(args):
    session.connect()
    print("Ray is up", flush=True)
    if args.wait:
        threading.Event().wait()  # for a signal
    return 75

entry.run(main, Args, None)
"""


@contextlib.contextmanager
def running(log: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ``COMMAND`` once it has Ray."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *flags],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        wait_for(lambda: process.poll() is not None or "Ray is up" in log.read_text(), 120, "Ray")
        yield process
    finally:
        process.kill()
        process.wait()


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def servers(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those without which a Ray ends."""
    return [each for each in processes if matches(each, r"\S*(gcs_server|/raylet) ")]


@pytest.mark.ray
def test_sigterm_to_a_group_spares_ray(tmp_path: Path) -> None:
    """Abseil's handler would print a trace, and abort the process 3 s later."""
    log = tmp_path / "log"
    with running(log) as process:
        processes = descendants(process)
        assert len(servers(processes)) == 2, log.read_text()
        # Others may end meanwhile.
        assert process.pid not in {os.getpgid(each.pid) for each in servers(processes)}
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == leave.TERMINATED, log.read_text()
        assert "SIGTERM received" not in log.read_text()
        wait_for(lambda: have_ended(processes), 60, "the end of Ray")


@pytest.mark.ray
def test_a_dead_ray_leaves_the_status(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(log) as process:
        processes = descendants(process)
        for each in servers(processes):
            each.kill()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130, log.read_text()
        wait_for(lambda: have_ended(processes), 60, "the end of Ray")


@pytest.mark.ray
def test_a_command_that_ends_ends_its_ray(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(log, "--no-wait") as process:
        assert process.wait(timeout=120) == 75, log.read_text()
        assert "Traceback" not in log.read_text()


def test_sigterm_keeps_its_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leave, "_is_terminated", False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with leave.keep_sigterm_handler():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with leave.keep_sigterm_handler():
            pass
        assert leave.interrupted_status() == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert leave.interrupted_status() == 143
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_during_the_start_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leave, "_is_terminated", False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt), leave.keep_sigterm_handler():
            sys.exit(15)  # as Ray's handler does
        assert leave.interrupted_status() == 143
    finally:
        signal.signal(signal.SIGTERM, before)


SLOW_SHUTDOWN = """
import atexit, os, signal, threading
import ray
from nanochat_ray.on_ray import leave

def shutdown(**options):
    print("alarm in", signal.alarm(0))
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()

ray.is_initialized = leave.is_up = lambda: True
ray.shutdown = shutdown
leave.SHUTDOWN_S = 600
signal.alarm(60)  # as Abseil's handler sets one
atexit.register(print, "clean")
leave.leave(75)
"""


def test_a_signal_hastens_the_end() -> None:
    process = subprocess.run(
        [sys.executable, "-c", SLOW_SHUTDOWN], capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stdout) == (75, "alarm in 0\nclean\n"), process.stderr
