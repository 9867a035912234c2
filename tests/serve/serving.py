"""A real server on a port of its own."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from nanochat_ray.serve.connections import ConnectionGuard
from nanochat_ray.serve.http_server import bind, server_of
from tests.waiting import wait_for

# Without TLS: to load certificates takes 24 ms for each client.
get = functools.partial(httpx.get, timeout=60, verify=False)
post = functools.partial(httpx.post, timeout=60, verify=False)
head = functools.partial(httpx.head, timeout=60, verify=False)
open_stream = functools.partial(httpx.stream, timeout=60, verify=False)
"""What these fetch must come, not come soon: a busy machine may take its time."""


_MAX_ENDING = 8
_ending: list[threading.Thread] = []
"""uvicorn takes 0.2 s to end, for which no test needs to wait."""


@contextlib.contextmanager
def serving(app: Any, guard: ConnectionGuard | None = None) -> Iterator[str]:
    """The URL at which ``app`` answers while the block runs."""
    server, listener = server_of(app, guard), bind("127.0.0.1", 0)
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    port = listener.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        _ending.append(thread)
        while len(_ending) > _MAX_ENDING:
            _ending.pop(0).join(10)
