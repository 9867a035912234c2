"""Runs a command in a child process and starts it again when the child dies.

For commands that resume by themselves: ``nanochat-ray train --restarts 3`` survives the death of
its driver in this way, and that of Ray Train's controller, with which the driver fails. ``rl`` and
``serve`` have it too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

from nanochat_ray.checkpoint.names import latest
from nanochat_ray.checks import require
from nanochat_ray.retry import retry
from nanochat_ray.storage import Store

MARK = "NANOCHAT_SUPERVISOR"
"""The environment variable that tells the child its supervisor's process id and, behind a colon,
1 if there was progress since the supervisor began, else 0."""
FIRST_DELAY_S, LAST_DELAY_S = 1.0, 60.0
"""Before a restart, and at most; doubled after each without progress."""
FAILED = 1
"""The exit status of an unexpected error."""


def is_child() -> bool:
    # Processes further down inherit the environment.
    return os.environ.get(MARK, "").partition(":")[0] == str(os.getppid())


def continues_run() -> bool:
    """Whether a process before this one, which the supervisor or torchrun has replaced, began the
    run: then it exists, whatever --resume says."""
    if is_child():
        return os.environ[MARK].endswith(":1")
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def supervise_run(restarts: int, storage: str, run: str) -> int:
    """``supervise`` for this process's own command, which trains ``run``: its progress is a new
    checkpoint. ValueError under torchrun, which has restarts of its own."""
    require("LOCAL_WORLD_SIZE" not in os.environ, "restarts", restarts, "not with torchrun")
    folder = Store.at(storage).child("runs", run)
    return supervise(
        restarts, lambda: retry(lambda: latest(folder), f"the checkpoints of {folder.uri}")
    )


def supervise(
    restarts: int, progress: Callable[[], object], command: Sequence[str] | None = None
) -> int:
    """Runs ``command``, by default this process's own, until it ends by itself; returns its status.

    It is started again at most ``restarts`` times: after a signal that nobody sent to this process,
    or after status 1 if ``progress()`` has changed since it started, as the next attempt would else
    fail in the same way. SIGTERM and SIGINT are passed on, and end the restarts. A child that a
    signal has ended for good gives status 128 + the number of the signal.
    """
    argv = list(command or (sys.executable, *sys.orig_argv[1:]))
    stop = threading.Event()
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stop.set()
        for child in children[-1:]:
            child.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
    delay = 0.0
    first = state = progress()
    try:
        for attempt in range(restarts + 1):
            environment = {**os.environ, MARK: f"{os.getpid()}:{int(state != first)}"}
            # A process group of its own, so that Ctrl-C reaches it once: through this process.
            child = subprocess.Popen(argv, env=environment, process_group=0)
            children.append(child)
            if stop.is_set():  # before there was a child to pass it on to
                child.terminate()
            status = child.wait()
            if stop.is_set() or (status >= 0 and status != FAILED):
                break
            before_attempt, state = state, progress()
            has_progress = state != before_attempt
            is_retryable = status < 0 or has_progress
            if not is_retryable or attempt == restarts:
                break
            delay = FIRST_DELAY_S if has_progress or not delay else min(2 * delay, LAST_DELAY_S)
            end = signal.Signals(-status).name if status < 0 else f"status {status}"
            print(
                f"process {child.pid} ended with {end}: restart {attempt + 1} of {restarts} "
                f"in {delay:g} s",
                file=sys.stderr,
                flush=True,
            )
            if stop.wait(delay):
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
