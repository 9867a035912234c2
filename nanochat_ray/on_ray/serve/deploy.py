"""Runs a Serve application and waits until it answers over HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
import urllib.request

import ray
from ray import serve

APP = "nanochat"


def check_port_is_free(host: str, port: int) -> None:
    """ValueError if something else has the port. A Serve that runs already keeps its own."""
    with contextlib.suppress(ValueError):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        return
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ValueError(f"port={port} on {host} cannot be had: {error}") from None


def deploy(app: serve.Application) -> None:
    """Runs ``app`` in place of what was deployed before.

    Raises ValueError with what a replica says that refuses to start.
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
    """ValueError if ``url`` does not serve ``name`` in time."""
    until = time.monotonic() + seconds
    found = "nothing answers"
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                model = json.load(response).get("model")
            if model == name:
                return
            found = f"it serves {model!r}"
        except (OSError, ValueError) as error:
            found = str(error)
        time.sleep(0.2)
    raise ValueError(
        f"{url} does not serve {name!r} ({found}); does Serve already run on another port?"
    )
