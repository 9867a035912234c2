"""How a process that uses Ray ends: with its own exit status, whatever is left of the cluster.

Ray works against this in three ways. A signal to the process group, such as that of ``timeout``,
also ends a cluster that this process has started. From ``ray.init`` on, Abseil's failure handler
answers SIGTERM: it prints a trace, and ends the process by SIGABRT unless it ends within 3 s.
``ray.shutdown`` waits a minute for a control service (GCS) that is gone, and without it the
interpreter crashes at its end in Ray's threads.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import ray
from ray._private import services, utils, worker

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit status of a command that SIGINT or SIGTERM ended, as a shell counts it."""
POLL_S = 0.1
GCS_END_S = 5.0
"""How long a cluster that ends may take to end its control service."""
SHUTDOWN_S = 15.0
"""How long ``ray.shutdown`` may take."""
is_leaving = threading.Event()
"""Set as soon as this process is about to end; it then ends with a status of its own."""
_is_terminated = False
_groups: list[int] = []
"""Process groups of the Ray that this process has started."""


@contextlib.contextmanager
def keep_sigterm_handler() -> Iterator[None]:
    """Around ``ray.init``: SIGTERM has its handler from before, without Abseil's. Without one it
    raises KeyboardInterrupt, so that files and processes are cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # raised by the handler that Ray sets for the meantime
        _terminate(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, _terminate if handler is signal.SIG_DFL else handler)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    global _is_terminated
    _is_terminated = True
    # Not SystemExit, whose status is lost in a call of Ray.
    raise KeyboardInterrupt


@contextlib.contextmanager
def own_session() -> Iterator[None]:
    """Puts processes that Ray starts meanwhile into a session of their own.

    A signal to this process's group or terminal does not reach them then, so that training can
    still write its checkpoint and a server finish its requests. They end with this process: the
    kernel kills them. Without such a kernel they stay in the group, by which Ray ends them.
    """
    if not utils.detect_fate_sharing_support():
        yield
        return
    popen = services.ConsolePopen

    class SessionPopen(popen):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "start_new_session": True})
            _groups.append(self.pid)

    services.ConsolePopen = SessionPopen  # type: ignore[misc]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


def interrupted_status() -> int:
    """The exit status after a KeyboardInterrupt: SIGTERM raises it too."""
    return TERMINATED if _is_terminated else INTERRUPTED


def leave(status: int, *, shutdown: bool = True) -> NoReturn:
    """Ends this process with ``status``. Its own Ray ends with it.

    ``ray.shutdown`` is called only if ``shutdown``, and while the cluster is up; a signal
    meanwhile hastens the end and does not change the status.
    """
    is_leaving.set()
    signal.alarm(0)  # Abseil's, of a signal during ray.init
    ends_at = time.monotonic() + (SHUTDOWN_S if shutdown else 0)

    def hasten(number: int, frame: FrameType | None) -> None:
        nonlocal ends_at
        ends_at = 0

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hasten)
    if shutdown and ray.is_initialized() and is_up():
        # In a thread: it cannot be interrupted. First it prints what workers have logged.
        end_ray = functools.partial(ray.shutdown, _exiting_interpreter=True)
        thread = threading.Thread(target=end_ray, name="ray-shutdown", daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() < ends_at:
            thread.join(POLL_S)
    end(status)


def end(status: int) -> NoReturn:
    """Ends this process and its own Ray, without a call of Ray."""
    is_leaving.set()
    atexit.unregister(ray.shutdown)
    atexit._run_exitfuncs()
    for group in _groups:
        # The agents of a raylet that was killed would stay for minutes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


def is_up() -> bool:
    """Whether the cluster that this process is in answers; False if a process of Ray's that this
    one has started has ended."""
    node = worker._global_node
    if node is None:
        return True  # ray://, whose server has the connection to the cluster
    if node.dead_processes():
        return False
    return is_listening(ray.get_runtime_context().gcs_address)


def is_listening(address: str) -> bool:
    """Whether something listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False
