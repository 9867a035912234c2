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
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET

from nanochat_ray.on_ray.thread import thread_beside

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit status of a command that SIGINT or SIGTERM ended, as a shell counts it."""
POLL_S = 0.1
NODE_POLL_S = 0.5
"""How often ``end_with_node`` looks."""
GCS_END_S = 5.0
"""How long a cluster that ends may take to end its control service."""
SHUTDOWN_S = 15.0
"""How long ``ray.shutdown`` may take."""
NODE_SERVICES = (PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET)
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
    _end(status)


def _end(status: int) -> NoReturn:
    """Ends this process and its own Ray, without a call of Ray."""
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


@contextlib.contextmanager
def end_with_node() -> Iterator[None]:
    """Meanwhile the death of the Ray that this process has started ends the process with status 1
    within seconds. Calls of Ray would wait for a minute, and then fail."""

    def watch(end: threading.Event) -> None:
        while not end.wait(NODE_POLL_S):
            services = dead_services()
            # Whoever ends all processes of a service may end this one last.
            if services and not end.wait(NODE_POLL_S):
                print(f"{' and '.join(services)} of Ray died", file=sys.stderr, flush=True)
                _end(1)

    with thread_beside(watch, "end-with-node"):
        yield


def is_up() -> bool:
    """Whether the cluster that this process is in answers; False if a process of Ray's that this
    one has started has ended."""
    node = worker._global_node
    if node is None:
        return True  # ray://, whose server has the connection to the cluster
    if node.dead_processes():
        return False
    return is_listening(ray.get_runtime_context().gcs_address)


def dead_services() -> list[str]:
    """Which of the processes without which a node ends have died, of a node that this process has
    started."""
    node = worker._global_node
    names: list[str] = []
    if node is not None:
        names = [name for name, _ in node.dead_processes()]
    return [name for name in names if name in NODE_SERVICES]


def is_listening(address: str) -> bool:
    """Whether something listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False
