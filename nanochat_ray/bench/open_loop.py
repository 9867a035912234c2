"""An open loop: requests are sent at given times, whatever becomes of those before.

The client shares the machine with the server, so it does the least while it sends: the requests are
made before, and what arrives is kept with its time and parsed afterwards.
"""

from __future__ import annotations

import errno
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from nanochat_ray.bench.http_stream import Response, Result

RECEIVE_BYTES = 1 << 16
ANSWER_S = 300.0
"""After the last request is sent, an answer may take as long."""


@dataclass
class Exchange:
    """One request, and what arrived on its connection."""

    began: float
    """``time.perf_counter``, as the times of ``chunks``."""
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""
    """Of the connection; "" if the server has closed it."""
    end: float = 0.0

    def result(self) -> Result:
        """What its client saw."""
        result = Result(self.began)
        response = Response(result)
        for now, data in self.chunks:
            response.feed(data, now)
        response.end(self.end, self.error)
        return result


class OpenLoop:
    """Sends ``requests`` to the host and port of ``url``, each ``dues`` seconds (ascending) after
    the start, over a connection of its own, which the server closes."""

    def __init__(self, url: str, requests: Sequence[bytes], dues: Sequence[float]):
        parts = urlsplit(url)
        infos = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        self._family, self._address = infos[0][0], infos[0][4]
        self.requests, self.dues = requests, dues
        self.exchanges: list[Exchange] = []
        self.send_delays_s: list[float] = []
        """By which each was sent late."""
        self.all_sent = threading.Event()
        self._selector = selectors.DefaultSelector()

    def run(self) -> list[Exchange]:
        """The exchanges in the order of the requests, when all are over."""
        start, num_sent = time.perf_counter(), 0
        try:
            with self._selector:
                while num_sent < len(self.requests) or self._selector.get_map():
                    now = time.perf_counter() - start
                    while num_sent < len(self.requests) and self.dues[num_sent] <= now:
                        self._send(self.requests[num_sent])
                        self.send_delays_s.append(now - self.dues[num_sent])
                        num_sent += 1
                    if num_sent < len(self.requests):
                        wait_s = self.dues[num_sent] - (time.perf_counter() - start)
                    else:
                        self.all_sent.set()
                        wait_s = self.dues[-1] + ANSWER_S - now
                        if wait_s < 0:
                            self._give_up()
                            break
                    self._receive(max(0.0, wait_s))
        finally:
            self.all_sent.set()
        return self.exchanges

    def _send(self, request: bytes) -> None:
        exchange = Exchange(time.perf_counter())
        self.exchanges.append(exchange)
        connection = socket.socket(self._family, socket.SOCK_STREAM)
        connection.setblocking(False)
        status = connection.connect_ex(self._address)
        if status not in (0, errno.EINPROGRESS):
            self._close(connection, exchange, OSError(status, errno.errorcode.get(status, "")))
            return
        self._selector.register(connection, selectors.EVENT_WRITE, (exchange, request))

    def _receive(self, wait_s: float) -> None:
        """What has arrived, or arrives within the time; requests whose connection is there go."""
        for key, events in self._selector.select(wait_s):
            connection, (exchange, request) = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            try:
                if events & selectors.EVENT_WRITE:
                    request = request[connection.send(request) :]
                    event = selectors.EVENT_WRITE if request else selectors.EVENT_READ
                    self._selector.modify(connection, event, (exchange, request))
                elif data := connection.recv(RECEIVE_BYTES):
                    exchange.chunks.append((time.perf_counter(), data))
                else:
                    self._end(connection, exchange, None)
            except OSError as error:
                self._end(connection, exchange, error)

    def _end(self, connection: socket.socket, exchange: Exchange, error: OSError | None) -> None:
        self._selector.unregister(connection)
        self._close(connection, exchange, error)

    def _close(self, connection: socket.socket, exchange: Exchange, error: OSError | None) -> None:
        connection.close()
        exchange.end = time.perf_counter()
        exchange.error = str(error or "")

    def _give_up(self) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            self._end(key.fileobj, key.data[0], TimeoutError(f"no end within {ANSWER_S:g} s"))
