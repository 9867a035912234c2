"""Runs a Serve application, waits until it answers over HTTP, and removes it."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
import urllib.request
from concurrent import futures
from types import FrameType

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from nanochat_ray.on_ray import session
from nanochat_ray.on_ray.leave import GCS_END_S, is_leaving, is_listening, leave

APP = "nanochat"
POLL_S = 0.2
REMOVE_S = 90.0
"""How long the deletion of an application may take, replicas that drain included."""
CONTROLLER_POLL_S = 0.05


def check_port_is_free(host: str, port: int) -> None:
    """Raises ValueError if another process has the port. A running Serve keeps its own."""
    if _has_controller():
        return
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ValueError(f"port={port} on {host} is not available: {error}") from None


def _has_controller() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def wait_for_controller(serve_start: futures.Future[None]) -> None:
    """Returns once Serve's controller exists, which takes applications before its proxies run; with
    the error of ``serve.start``, which runs as ``serve_start``, if it fails."""
    while not _has_controller():
        if futures.wait([serve_start], CONTROLLER_POLL_S).done:
            serve_start.result()
            return


def deploy(app: serve.Application) -> None:
    """Runs ``app`` in place of what was deployed before.

    Raises ValueError with the error of a replica that cannot start.
    """
    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        # Serve has the replica's exception as the text of a trace, here or in its status.
        status = serve.status().applications.get(APP)
        deployments = status.deployments.values() if status else ()
        text = "\n".join([str(error), *(each.message for each in deployments)])
        refusals = re.findall(r"^\s*(?:ValueError|\w*Error: \[Errno \d+\]).*$", text, re.M)
        if not refusals:
            raise
        raise ValueError(refusals[-1].strip().removeprefix("ValueError: ")) from None


def wait_until_up(url: str, name: str, seconds: float = 60.0) -> None:
    """Raises ValueError if ``url`` does not serve ``name`` in time."""
    until = time.monotonic() + seconds
    state = "nothing answers"
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                model = json.load(response).get("model")
            if model == name:
                return
            state = f"it serves {model!r}"
        except (OSError, ValueError) as error:
            state = str(error)
        time.sleep(0.2)
    raise ValueError(
        f"{url} does not serve {name!r} ({state}); does Serve already run on another port?"
    )


def remove() -> bool:
    """Deletes the application; its replicas finish their requests first.

    False if the cluster ends meanwhile, or is too slow: whoever ends all processes of a service or
    a machine also ends Ray, and nothing can be drained then. Call ``leave`` without a shutdown in
    this case.
    """
    gcs_address = ray.get_runtime_context().gcs_address
    deletion: futures.Future[None] = futures.Future()

    def delete() -> None:
        try:
            deletion.set_result(serve.delete(APP))
        except BaseException as error:
            deletion.set_exception(error)

    threading.Thread(target=delete, name="delete-application", daemon=True).start()
    until = time.monotonic() + REMOVE_S
    while not futures.wait([deletion], POLL_S).done:
        if not is_listening(gcs_address) or time.monotonic() > until:
            return False
    try:
        deletion.result()
    except (RayError, RayServeException):
        if session.has_started_ray():
            return False  # Serve ends with this process in any case
        # Serve's controller may end before Ray's control service (GCS) does.
        until = time.monotonic() + GCS_END_S
        while is_listening(gcs_address):
            if time.monotonic() > until:
                raise
            time.sleep(POLL_S)
        return False
    return True


def stay() -> None:
    """Waits for SIGINT or SIGTERM and removes the application. The process ends with status 0 if
    its Ray ends with it or is gone, and at a second signal; if its Ray dies before,
    ``own_node.watch`` ends it."""
    num_signals = 0

    def count(number: int, frame: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1:
            leave(0, shutdown=False)

    # A container is ended by SIGTERM, and a shell's background job ignores SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, count)
    while not num_signals:
        time.sleep(POLL_S)
    is_leaving.set()  # whoever has sent the signal may end Ray, too
    if not remove() or session.has_started_ray():
        leave(0, shutdown=False)
