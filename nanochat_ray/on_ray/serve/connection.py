"""The connection between an ingress and an engine: MessagePack values over one TCP socket.

Ray starts both processes and gives the ingress the address and the secret, but carries no tokens:
a message of a Ray stream costs about 1 ms of processor time, a call through a Serve handle several
(BENCHMARKS.md).

Every message is a list whose first element names it:

    ingress → engine    handshake(secret, ingress)   submit(request)   abort(ids)
                        heartbeat(), every second
    engine → ingress    handshake(status)   reply(id, text)   outputs([output, …])
                        reply(id, QUEUE_FULL, seconds to wait)
                        heartbeat(status), every second   draining()

A request that belongs to an answer which has begun names its weights, and so does the first output
of every answer: other weights never continue it.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable
from typing import Any, cast

import msgpack

MAX_MESSAGE_BYTES = 64 << 20
MAX_HANDSHAKE_BYTES = 1 << 10
MAX_HANDSHAKES = 128
HANDSHAKE_S = 5.0
HEARTBEAT_S = 1.0
LIVENESS_TIMEOUT_S = 10.0
"""A connection without messages for this long counts as broken, since the peer may hang or its host
have vanished: each side sends a heartbeat every second."""
# An engine's reply to a request; any other reply is the reason of a refusal.
ACCEPTED = "accepted"
QUEUE_FULL = "queue full"
NOT_HERE = "not here"
"""The engine is dead or stopping; another replica may accept the request."""
OTHER_WEIGHTS = "other weights"
"""The engine has other weights than those that the request names."""


class Connection(asyncio.Protocol):
    """One end. ``on_message`` gets each complete message, ``on_disconnected`` is called once.

    ``is_trusted`` is False until the other side has sent the secret: until then no more than a
    handshake is read.
    """

    def __init__(
        self,
        on_message: Callable[[Connection, list[Any]], None],
        on_disconnected: Callable[[Connection], None],
        is_trusted: bool = True,
        on_connected: Callable[[Connection], None] = lambda connection: None,
    ):
        self._on_message, self._on_connected = on_message, on_connected
        self._on_disconnected = on_disconnected
        self.is_trusted = is_trusted
        self.last_received = time.monotonic()
        self._unpacker: Any = msgpack.Unpacker(max_buffer_size=MAX_MESSAGE_BYTES)
        self._num_bytes = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Keep-alive probes are not sent while data is unacknowledged: that is TCP_USER_TIMEOUT.
        for option, value in (
            *(("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)),
            ("TCP_USER_TIMEOUT", int(1000 * LIVENESS_TIMEOUT_S)),
        ):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._on_connected(self)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        self.last_received = time.monotonic()
        if not self.is_trusted and self._num_bytes > MAX_HANDSHAKE_BYTES:
            self.close()
            return
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                self._on_message(self, message)
                if not self.is_trusted:
                    self.close()
                    return
        except (ValueError, msgpack.UnpackException, TypeError):
            if self.is_trusted:
                raise
            self.close()  # a stranger

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._on_disconnected(self)

    def send(self, *message: Any) -> None:
        if self._transport is not None:
            # Text from a client may hold lone surrogates, which UTF-8 cannot carry.
            self._transport.write(msgpack.packb(message, unicode_errors="replace"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """As ``close``, but unsent data is discarded."""
        if self._transport is not None:
            self._transport.abort()


class SilenceLimit:
    """How long a peer may be silent, for a process that looks several times in ``seconds``.

    While that process stands still, stopped or short of CPU time, it hears nobody. When it goes on
    it reads what has arrived before it calls a peer silent.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.last_look = time.monotonic()

    def oldest(self) -> float:
        """At a look: a peer whose last message is older (``time.monotonic``) is silent."""
        before, self.last_look = self.last_look, time.monotonic()
        stood_still = self.last_look - before > self._seconds / 2
        return -math.inf if stood_still else self.last_look - self._seconds


class Handshakes:
    """Bounds the connections that have not sent the secret, in number and in time, so that they
    cannot use up the file descriptors of the process."""

    def __init__(self, *, most: int = MAX_HANDSHAKES, seconds: float = HANDSHAKE_S):
        self._most, self._seconds = most, seconds
        self._waiting: dict[Connection, asyncio.TimerHandle] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, connection: Connection) -> None:
        """Closes ``connection`` unless ``end`` is called in time; of too many, the oldest."""
        while len(self._waiting) >= self._most:
            self._drop(next(iter(self._waiting)))
        later = asyncio.get_running_loop().call_later(self._seconds, self._drop, connection)
        self._waiting[connection] = later

    def end(self, connection: Connection) -> None:
        """``connection`` has sent the secret or is closed."""
        if timer := self._waiting.pop(connection, None):
            timer.cancel()

    def _drop(self, connection: Connection) -> None:
        self.end(connection)
        connection.close()
