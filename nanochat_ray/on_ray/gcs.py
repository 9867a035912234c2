"""Ray's control service (GCS) of a cluster that this process has started: it may die, too.

Ray ends a minute after its GCS. One that stores its state can be started again meanwhile, and the
rest of the cluster goes on: no actor ends, no stream of Serve breaks.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from ray._private import worker

from nanochat_ray.on_ray.leave import own_session

STORAGE, PATH = "RAY_gcs_storage", "RAY_gcs_storage_path"


def store_state() -> None:
    """Makes the GCS of a Ray that this process starts afterwards store its state on this machine,
    until the process ends. A storage that the environment names already is kept."""
    if STORAGE in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="nanochat-gcs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {STORAGE: "rocksdb", PATH: folder}


def restart() -> bool:
    """Starts the GCS of this process's own Ray again, which has died. False if it has stored
    nothing."""
    node = worker._global_node
    if node is None or not node._is_rocksdb_gcs():
        return False
    node.kill_gcs_server(check_alive=False)  # forgets the process
    with own_session():
        node.start_gcs_server()
    return True
