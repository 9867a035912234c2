"""A small HTTP/1.1 client for streamed answers, which notes when each event arrives.

The first token is the first chunk with a choice. The client does little on purpose: it shares the
machine with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit


@dataclass
class Result:
    """One request as its client saw it."""

    began: float
    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    error: str = ""
    status: int = 0
    """Of the response; 0 without one."""
    retry_after_s: int | None = None
    """What the header Retry-After says."""
    fingerprints: list[str] = field(default_factory=list)
    """``system_fingerprint`` of its chunks: each once, in their order."""

    @property
    def per_token_s(self) -> float:
        return (self.total_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0


class Response:
    """Parses one HTTP/1.1 response into ``result``; each ``data:`` event has its time."""

    def __init__(self, result: Result):
        self.result = result
        self.is_complete = False
        """Whether no event is to come."""
        self.is_over = False
        """Whether its last byte is there, so that its connection may carry another request."""
        self._status = 0
        self._head = b""
        self._is_chunked = False
        self._bytes_left = math.inf
        """Of a body that is not chunked."""
        self._frame = b""
        self._chunk_remaining = 0
        self._line = b""
        self._body = b""
        self._last = 0.0

    def feed(self, data: bytes, now: float) -> None:
        """The next bytes, which arrived at ``now``."""
        if not self._status:
            self._head += data
            head, mark, data = self._head.partition(b"\r\n\r\n")
            if not mark:
                return
            self._status = self.result.status = int(head.split(b" ", 2)[1])
            self._is_chunked = b"transfer-encoding: chunked" in head.lower()
            if match := re.search(rb"\r\nretry-after: *(\d+)", head, re.IGNORECASE):
                self.result.retry_after_s = int(match[1])
            if match := re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE):
                self._bytes_left = int(match[1])
        if self._is_chunked:
            body = self._decode_chunks(data)
        else:
            body = data
            self._bytes_left -= len(data)
            self.is_over = self._bytes_left <= 0
        if self._status != 200:
            self._body += body
            if self.is_over:
                self.end(now, "no error in the body")
            return
        *lines, self._line = (self._line + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                self._event(line[6:].strip(), now)

    def end(self, now: float, error: str = "") -> None:
        """Nothing more comes, or the connection has ended."""
        if not self.is_complete:
            cause = f"the connection ended: {error}"
            what = self._body.decode(errors="replace")[:300] if self._body else cause
            self.result.error = f"status {self._status}: {what}"
            self.result.total_s = now - self.result.began
            self.is_complete = True

    def _decode_chunks(self, data: bytes) -> bytes:
        """Proxies cut chunks anew, so an event may lie in two."""
        body_bytes = b""
        data = self._frame + data
        while data:
            if not self._chunk_remaining:
                size, mark, rest = data.lstrip(b"\r\n").partition(b"\r\n")
                if not mark:
                    break
                self._chunk_remaining = int(size.split(b";")[0], 16)
                if not self._chunk_remaining:
                    self.is_over = rest.startswith(b"\r\n")
                    break
                data = rest
            piece, data = data[: self._chunk_remaining], data[self._chunk_remaining :]
            self._chunk_remaining -= len(piece)
            body_bytes += piece
        self._frame = data
        return body_bytes

    def _event(self, data: bytes, now: float) -> None:
        result = self.result
        if data == b"[DONE]":
            self.is_complete = True
            return
        event = json.loads(data)
        if "error" in event:
            result.error = event["error"]["message"]
            self.is_complete = True
            return
        if usage := event.get("usage"):
            result.tokens = usage["completion_tokens"]
            result.prompt_tokens = usage["prompt_tokens"]
        if not event["choices"]:
            return
        result.text += event["choices"][0].get("text") or ""
        fingerprint = event.get("system_fingerprint") or ""
        if fingerprint and fingerprint not in result.fingerprints:
            result.fingerprints.append(fingerprint)
        if not self._last:
            result.first_s = now - result.began
        else:
            result.gaps_s.append(now - self._last)
        self._last = now
        result.total_s = now - result.began


class Connection(asyncio.Protocol):
    """Carries one HTTP/1.1 exchange after the other; events are taken as they arrive."""

    transport: asyncio.Transport
    _response: Response | None = None
    _end: asyncio.Future[None]

    @classmethod
    async def open(cls, url: str) -> Connection:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        _, connection = await asyncio.get_running_loop().create_connection(
            cls,
            parts.hostname or "127.0.0.1",
            parts.port or (443 if secure else 80),
            ssl=secure or None,
        )
        return connection

    @property
    def is_open(self) -> bool:
        return not self.transport.is_closing()

    async def exchange(self, request: bytes, response: Response) -> None:
        """Returns with the last byte of the response, or with the end of the connection."""
        self._response, self._end = response, asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._response is None:
            self.transport.abort()  # it has asked for nothing
            return
        self._response.feed(data, time.perf_counter())
        if self._response.is_over:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        if self._response is not None:
            self._response.end(time.perf_counter(), str(error or ""))
            self._finish()

    def _finish(self) -> None:
        self._response = None
        if not self._end.done():
            self._end.set_result(None)
