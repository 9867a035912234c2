"""The node of a Ray that this process has started: what happens when its services die.

Ray ends a minute after its control service (GCS). One that stores its state can be started again
meanwhile, and the rest of the cluster goes on: no actor ends, no stream of Serve breaks. Without
its raylet the node is lost, and calls of Ray would wait for a minute before they fail.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from ray._private import worker
from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET

from nanochat_ray.on_ray import leave

STORAGE, PATH = "RAY_gcs_storage", "RAY_gcs_storage_path"
PREFIX, OWNER = "nanochat-gcs-", "owner"
"""Of a folder's name; and its file that the process locks whose folder it is, while it lives."""
SERVICES = (PROCESS_TYPE_GCS_SERVER, PROCESS_TYPE_RAYLET)
"""The processes without which a node ends."""
POLL_S = 0.2
CONFIRM_S = 0.5
"""Whoever ends all processes of a machine may end this one last."""
RESTART_S = 60.0
"""A control service that dies again so soon is not started a second time."""


def store_state() -> None:
    """Makes the GCS of a Ray that this process starts afterwards store its state on this machine,
    until the process ends. A storage that the environment names already is kept."""
    if STORAGE in os.environ:
        return
    _remove_orphans()
    folder, _ = _new_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {STORAGE: "rocksdb", PATH: folder}


def _new_folder() -> tuple[str, int]:
    """And the descriptor that holds its lock."""
    folder = tempfile.mkdtemp(prefix=PREFIX)
    lock = os.path.join(folder, OWNER)
    descriptor = os.open(f"{lock}.new", os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(f"{lock}.new", lock)  # nobody sees it without its lock
    return folder, descriptor


def _remove_orphans() -> None:
    """Removes the folders of processes that SIGKILL has ended: 20 MB each."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError), lock.open() as file:  # another user's, or a live one's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def watch() -> None:
    """From now on a GCS that dies alone is started again, and the process ends with status 1
    within seconds when the node is lost, unless it is about to leave."""
    # A thread that lives as long as the process: the kernel ends with it what it has started.
    threading.Thread(target=_watch, name="own-node", daemon=True).start()


def _watch() -> None:
    gcs_start = -math.inf
    while not leave.is_leaving.wait(POLL_S):
        if not dead_services() or leave.is_leaving.wait(CONFIRM_S):
            continue
        services = dead_services()
        is_first = time.monotonic() > gcs_start + RESTART_S
        if services == [PROCESS_TYPE_GCS_SERVER] and is_first and restart_gcs():
            gcs_start = time.monotonic()
            text = "the control service (GCS) of Ray died: started again"
            print(text, file=sys.stderr, flush=True)
        elif services:
            text = f"{' and '.join(services)} of Ray died: this command ends"
            print(text, file=sys.stderr, flush=True)
            leave.end(1)


def dead_services() -> list[str]:
    """Which services have died, of a node that this process has started."""
    node = worker._global_node
    names: list[str] = []
    if node is not None:
        names = [name for name, _ in node.dead_processes()]
    return [name for name in names if name in SERVICES]


def restart_gcs() -> bool:
    """Starts the GCS of this process's own Ray again, which has died. False if it has stored
    nothing."""
    node = worker._global_node
    if node is None or not node._is_rocksdb_gcs():
        return False
    node.kill_gcs_server(check_alive=False)  # forgets the process
    with leave.own_session():
        node.start_gcs_server()
    return True
