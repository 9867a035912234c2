"""Bounds what a connection without a request may hold of an HTTP server, and for how long.

A client that sends nothing, or its head byte by byte, holds a file descriptor; one that does not
read its answer holds the answer too. Neither costs the server anything else, so that an attacker
needs little to use up all descriptors: then nobody else can connect.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

HEAD_TIMEOUT_S = 10.0
"""From the start of a connection, or its last response, to the end of a request's head."""
STALL_TIMEOUT_S = 60.0
"""How long a client may leave a full buffer of its answer unread."""
MAX_CONNECTIONS = 16384
SPARE_FILES = 64
"""File descriptors for all but connections of clients: logs, checkpoints, libraries."""


class ClientConnection(Protocol):
    """A connection that can be ended."""

    def expire(self) -> None:
        """Its head did not come in time."""

    def abort(self) -> None:
        """Its client does not read, or others need its descriptor."""


@dataclass
class ConnectionGuard:
    """The connections of one server that wait for a request or for their client to read."""

    max_connections: int = MAX_CONNECTIONS
    head_timeout_s: float = HEAD_TIMEOUT_S
    stall_timeout_s: float = STALL_TIMEOUT_S
    clock: Callable[[], float] = time.monotonic
    _waiting: dict[ClientConnection, float] = field(default_factory=dict)
    """Without a request, each with the time since when; the longest first."""
    _stalls: dict[ClientConnection, float] = field(default_factory=dict)

    def await_request(self, connection: ClientConnection) -> None:
        """The connection is new, or its response is complete."""
        self._waiting.pop(connection, None)
        self._waiting[connection] = self.clock()

    def begin_request(self, connection: ClientConnection) -> None:
        """The head of a request is complete."""
        self._waiting.pop(connection, None)

    def begin_stall(self, connection: ClientConnection) -> None:
        """The client reads more slowly than the server writes."""
        self._stalls.setdefault(connection, self.clock())

    def end_stall(self, connection: ClientConnection) -> None:
        self._stalls.pop(connection, None)

    def forget(self, connection: ClientConnection) -> None:
        """The connection is closed."""
        self._waiting.pop(connection, None)
        self._stalls.pop(connection, None)

    def make_room(self, num_connections: int) -> bool:
        """Called with the number of open connections, a new one included: ends the one that waits
        longest if there are too many. False if all others have requests."""
        if num_connections <= self.max_connections:
            return True
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        self.forget(oldest)
        oldest.abort()
        return True

    def sweep(self) -> None:
        """Ends the connections whose time is over."""
        now = self.clock()
        for connection in _older(self._waiting, now - self.head_timeout_s):
            self.forget(connection)
            connection.expire()
        for connection in _older(self._stalls, now - self.stall_timeout_s):
            self.forget(connection)
            connection.abort()


def _older(connections: dict[ClientConnection, float], limit: float) -> list[ClientConnection]:
    older = []
    for connection, since in connections.items():
        if since > limit:
            break
        older.append(connection)
    return older


def raise_file_limit() -> int:
    """Lets this process open as many files as it may, and returns how many connections that
    allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < most:
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft - SPARE_FILES))
