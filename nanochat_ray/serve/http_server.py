"""uvicorn with a socket that is bound in advance, bounded shutdown, and support for h2c offers."""

from __future__ import annotations

import logging
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SHUTDOWN_S = 5.0
"""How long answers may continue after SIGTERM."""
MAX_HEAD_BYTES = 1 << 16


class _H11(H11Protocol):
    def _unsupported_upgrade_warning(self) -> None:
        """The client continues with HTTP/1.1, as it must without an upgrade (RFC 9110, 7.8)."""


class _Protocol(HttpToolsProtocol):
    """httptools; h11, which is slower, for a connection whose requests offer an upgrade.

    httptools stops parsing at ``Upgrade`` and loses the body. Java's HttpClient offers ``h2c`` with
    every request.
    """

    def data_received(self, data: bytes) -> None:
        if (self.cycle is None or self.cycle.response_complete) and _offers_upgrade(data):
            self.connections.discard(self)
            self._unset_keepalive_if_required()
            other = _H11(self.config, self.server_state, self.app_state, _loop=self.loop)
            other.connection_made(self.transport)
            self.transport.set_protocol(other)
            other.data_received(data)
        else:
            super().data_received(data)


def _offers_upgrade(data: bytes) -> bool:
    head = data[:MAX_HEAD_BYTES].partition(b"\r\n\r\n")[0]
    return b"\r\nupgrade:" in head.lower()


def server_of(app: FastAPI) -> uvicorn.Server:
    """A server whose ``run`` takes the sockets of ``bind``."""
    # uvicorn may not set up logging: the access log is the application's own.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,  # type: ignore[arg-type]
    )
    return uvicorn.Server(config)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. ValueError if the address is not free or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"port={port} on host={host} is not allowed: {reason}") from None
