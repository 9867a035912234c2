"""The connection between an ingress and an engine: MessagePack values over one TCP socket.

Ray places both, tells each of the other and hands over the secret; tokens do not go through it.
A stream of Ray's costs about a millisecond of processor time for each message and a call through a
Serve handle several, which on two cores is what the engine computes with: see NOTES.md.

Every message is a list whose first element names it:

    ingress → engine    hello(secret, ingress)   submit(request)   abort(ids)
    engine → ingress    hello(figures)   answer(id, text)   outputs([output, …])
                        status(figures), every second   leaving()
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import msgpack

MAX_MESSAGE_BYTES = 64 << 20
MAX_HELLO_BYTES = 1 << 10
MAX_HANDSHAKES = 128
HANDSHAKE_S = 5.0
# What an engine answers to a request; anything else says why it refuses it.
ACCEPTED = "accepted"
QUEUE_FULL = "queue full"
NOT_HERE = "not here"
"""The engine is dead or stopping; another may take it."""


class Link(asyncio.Protocol):
    """One end. ``on_message`` gets every message after it is complete, ``on_lost`` comes once.

    ``trusted`` is False until the other side has shown who it is: so long, only as much as a hello
    is read.
    """

    def __init__(
        self,
        on_message: Callable[[Link, list[Any]], None],
        on_lost: Callable[[Link], None],
        trusted: bool = True,
        on_made: Callable[[Link], None] = lambda link: None,
    ):
        self._on_message, self._on_lost, self._on_made = on_message, on_lost, on_made
        self.trusted = trusted
        self._unpacker: Any = msgpack.Unpacker(max_buffer_size=MAX_MESSAGE_BYTES)
        self._seen = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        # A host that vanishes without a word is noticed after half a minute.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._on_made(self)

    def data_received(self, data: bytes) -> None:
        self._seen += len(data)
        if not self.trusted and self._seen > MAX_HELLO_BYTES:
            self.close()
            return
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                self._on_message(self, message)
                if not self.trusted:
                    self.close()
                    return
        except (ValueError, msgpack.UnpackException, TypeError):
            if self.trusted:
                raise
            self.close()  # a stranger

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._on_lost(self)

    def send(self, *message: Any) -> None:
        if self._transport is not None:
            # Text from a client may hold lone surrogates, which UTF-8 cannot carry.
            self._transport.write(msgpack.packb(message, unicode_errors="replace"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Handshakes:
    """Bounds the connections that have not said the secret yet, in number and in time, so that they
    cannot use up the process's file descriptors."""

    def __init__(self, *, most: int = MAX_HANDSHAKES, seconds: float = HANDSHAKE_S):
        self._most, self._seconds = most, seconds
        self._waiting: dict[Link, asyncio.TimerHandle] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, link: Link) -> None:
        """Closes ``link`` unless ``end`` comes in time; if there are too many, the oldest."""
        while len(self._waiting) >= self._most:
            self._drop(next(iter(self._waiting)))
        later = asyncio.get_running_loop().call_later(self._seconds, self._drop, link)
        self._waiting[link] = later

    def end(self, link: Link) -> None:
        """``link`` is trusted, or gone."""
        if timer := self._waiting.pop(link, None):
            timer.cancel()

    def _drop(self, link: Link) -> None:
        self.end(link)
        link.close()
