"""Connections that hold a server up: by a clock of the test's own, and over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from nanochat_ray.serve import connections
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.connections import ConnectionGuard
from nanochat_ray.serve.http_server import _H11, MAX_HEAD_BYTES, bind, run, server_of
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import post, serving
from tests.waiting import wait_for

TOK = Tokenizer.bytes_only()


class Ends:
    """A connection, and how it was ended."""

    def __init__(self) -> None:
        self.end = ""

    def expire(self) -> None:
        self.end = "expired"

    def abort(self) -> None:
        self.end = "aborted"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guard(clock: Clock) -> ConnectionGuard:
    return ConnectionGuard(2, clock=clock)  # the times are those of README.md


def test_a_head_has_a_time_limit(guard: ConnectionGuard, clock: Clock) -> None:
    idle, late, busy = Ends(), Ends(), Ends()
    guard.await_request(idle)
    guard.await_request(busy)
    clock.now = 1
    guard.await_request(late)
    guard.begin_request(busy)
    clock.now = 9.9
    guard.sweep()
    assert idle.end == ""
    clock.now = 10
    guard.sweep()
    assert (idle.end, late.end, busy.end) == ("expired", "", "")
    guard.await_request(busy)  # its response is complete
    clock.now = 11
    guard.sweep()
    assert (late.end, busy.end) == ("expired", "")
    clock.now = 20
    guard.sweep()
    assert busy.end == "expired"


def test_a_client_must_read(guard: ConnectionGuard, clock: Clock) -> None:
    slow, stuck, other = Ends(), Ends(), Ends()
    for one in (slow, stuck, other):
        guard.begin_stall(one)
    clock.now = 59
    guard.sweep()
    assert (slow.end, stuck.end) == ("", "")
    guard.end_stall(slow)
    guard.begin_stall(slow)
    guard.begin_stall(stuck)  # it has not begun anew
    guard.forget(other)
    clock.now = 60
    guard.sweep()
    assert (slow.end, stuck.end, other.end) == ("", "aborted", "")


def test_the_oldest_idle_connection_makes_room(guard: ConnectionGuard) -> None:
    first, second = Ends(), Ends()
    guard.await_request(first)
    guard.await_request(second)
    guard.await_request(first)  # it waits anew
    assert guard.make_room(2)
    assert guard.make_room(3)
    assert (first.end, second.end) == ("", "aborted")
    guard.begin_request(first)
    assert not guard.make_room(3)
    assert first.end == ""


def test_the_limit_on_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.__setitem__(0, pair[0]))
    assert connections.raise_file_limit() == 4096 - connections.SPARE_FILES
    limits[:] = [1024, resource.RLIM_INFINITY]
    assert connections.raise_file_limit() == connections.MAX_CONNECTIONS
    limits[:] = [resource.RLIM_INFINITY] * 2
    assert connections.raise_file_limit() == connections.MAX_CONNECTIONS


class Transport:
    """With so many bytes that its client has not read."""

    def __init__(self, num_bytes: int):
        self.num_bytes, self.is_closing = num_bytes, False

    def close(self) -> None:
        self.is_closing = True

    def get_write_buffer_size(self) -> int:
        return self.num_bytes


@pytest.mark.parametrize("num_bytes", [0, 1])
def test_an_idle_connection_may_have_unread_bytes(guard: ConnectionGuard, num_bytes: int) -> None:
    """It is closed when they are read, or after the time for that."""
    connection = _H11.__new__(_H11)
    connection.config = SimpleNamespace(guard=guard)  # type: ignore[assignment]
    connection.transport = transport = Transport(num_bytes)  # type: ignore[assignment]
    connection.expire()
    assert transport.is_closing
    assert len(guard._stalls) == num_bytes


# --- over sockets -------------------------------------------------------------------------------

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"


@pytest.fixture
def url(guard: ConnectionGuard) -> Iterator[str]:
    guard.max_connections = 3
    with serving(build_app(ScriptedClient([65] * 20), TOK, "tiny", 256), guard) as url:
        yield url


@pytest.fixture
def connect(url: str) -> Iterator[Callable[[], socket.socket]]:
    address = url.removeprefix("http://").split(":")
    sockets: list[socket.socket] = []

    def new() -> socket.socket:
        sockets.append(socket.create_connection((address[0], int(address[1])), timeout=60))
        return sockets[-1]

    yield new
    for one in sockets:
        one.close()


def read(connection: socket.socket) -> bytes:
    """All until the server closes."""
    answer = b""
    while data := connection.recv(65536):
        answer += data
    return answer


@pytest.mark.parametrize("begin", [b"", HEAD, HEAD + UPGRADE])
def test_an_incomplete_head_ends(
    connect: Callable[[], socket.socket], guard: ConnectionGuard, clock: Clock, begin: bytes
) -> None:
    connection = connect()
    connection.sendall(begin)
    wait_for(lambda: bool(guard._waiting))
    # The server has read what was sent; otherwise the clock would start anew then.
    if begin:
        wait_for(lambda: any(getattr(one, "_is_in_head", False) for one in list(guard._waiting)))
    clock.now = 10.0
    answer = read(connection)
    if begin:
        assert answer.startswith(b"HTTP/1.1 408 ")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["message"] == "The head of the request came too slowly."
    else:
        assert answer == b""


@pytest.mark.parametrize("extra", [b"", UPGRADE])
def test_a_request_is_no_longer_timed(
    connect: Callable[[], socket.socket], guard: ConnectionGuard, extra: bytes
) -> None:
    connection = connect()
    connection.sendall(HEAD + extra + b"Content-Length: %d\r\n\r\n" % len(BODY))
    wait_for(lambda: not guard._waiting)
    connection.sendall(BODY)
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    wait_for(lambda: len(guard._waiting) == 1)  # for the next request


def test_an_http_1_0_stream_ends_with_its_connection(connect: Callable[[], socket.socket]) -> None:
    """HTTP/1.0 has no chunks (RFC 9112, 6.1)."""
    body = json.dumps({"prompt": "x", "max_tokens": 2, "stream": True}).encode()
    connection = connect()
    old = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")
    connection.sendall(old + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    head, _, events = read(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("at", [1, len(HEAD), len(HEAD) + 3, len(HEAD + UPGRADE)])
def test_a_head_that_offers_an_upgrade_may_come_in_parts(
    connect: Callable[[], socket.socket], guard: ConnectionGuard, at: int
) -> None:
    request = HEAD + UPGRADE + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    connection = connect()
    connection.sendall(request[:at])
    wait_for(lambda: any(getattr(one, "_is_in_head", False) for one in list(guard._waiting)))
    connection.sendall(request[at:])
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_refusal_is_read_by_a_client_that_still_sends(url: str) -> None:
    """urllib sends ``Connection: close``, and reads nothing before it has sent everything."""
    request = urllib.request.Request(f"{url}/v1/completions", bytes(20 << 20))
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=60)
    assert refusal.value.code == 413
    assert json.load(refusal.value)["error"]["message"].startswith("The body is larger")


def test_a_client_that_sends_on_after_a_refusal_ends(
    connect: Callable[[], socket.socket], clock: Clock
) -> None:
    connection = connect()
    connection.sendall(HEAD + b"Connection: close\r\nContent-Length: 9999999\r\n\r\nx")
    assert read(connection).startswith(b"HTTP/1.1 413 ")  # and then the server's side is closed
    connection.sendall(b"x")

    def is_reset() -> bool:
        clock.now += 10.0  # at each look: the server may begin to wait after the first one
        try:
            connection.sendall(b"x")
        except OSError:
            return True
        return False

    wait_for(is_reset)


def test_an_endless_head_is_431(
    connect: Callable[[], socket.socket], guard: ConnectionGuard
) -> None:
    connection = connect()
    connection.sendall(HEAD)
    wait_for(lambda: any(getattr(one, "_is_in_head", False) for one in list(guard._waiting)))
    # Not a byte more: the server would answer unread data by a reset.
    connection.sendall(b"X-Long: ".ljust(MAX_HEAD_BYTES + 1, b"x"))
    assert read(connection).startswith(b"HTTP/1.1 431 ")


def test_trailers_are_dropped(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    chunk = b"%x\r\n%s\r\n" % (len(BODY), BODY)
    trailers = b"0\r\n" + b"X-Trailer: 1\r\n" * 1000 + b"\r\n"
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + trailers)
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_no_http_is_an_openai_error(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    answer = read(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_idle_connections_leave_room(connect: Callable[[], socket.socket]) -> None:
    idle = [connect() for _ in range(8)]
    url = "http://{}:{}".format(*idle[0].getpeername())
    assert post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}).is_success
    assert read(idle[0]) == b""  # the oldest were closed


def test_busy_connections_are_503(
    connect: Callable[[], socket.socket], guard: ConnectionGuard
) -> None:
    for _ in range(3):
        busy = connect()
        wait_for(lambda: len(guard._waiting) == 1)  # accepted
        busy.sendall(HEAD + b"Content-Length: 5\r\n\r\n")
        wait_for(lambda: not guard._waiting)
    answer = read(connect())
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 1\r\n" in answer


def test_connections_that_wait_are_accepted_together() -> None:
    """A busy event loop has few iterations: in a flood each must accept all that wait."""
    server, listener = (
        server_of(build_app(ScriptedClient([65]), TOK, "tiny", 256)),
        bind("127.0.0.1", 0),
    )
    num_connections = 100

    async def connect_all() -> int:
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup(sockets=[listener])
        address = ("127.0.0.1", listener.getsockname()[1])
        with contextlib.ExitStack() as stack:
            for _ in range(num_connections):
                stack.enter_context(socket.create_connection(address))
            for _ in range(10):
                await asyncio.sleep(0)
            count = len(server.server_state.connections)
        await server.shutdown(sockets=[listener])
        return count

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        assert runner.run(connect_all()) == num_connections


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
def test_every_interface_is_that_of_ipv4_too() -> None:
    with bind("::", 0) as listener:
        address = ("127.0.0.1", listener.getsockname()[1])
        socket.create_connection(address, timeout=60).close()


def test_the_body_does_not_wait_for_an_acknowledgement_of_the_head() -> None:
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_not_the_process(number: signal.Signals) -> None:
    """So that what it holds is released, and with status 0 as on Ray."""
    server = server_of(build_app(ScriptedClient([65]), TOK, "tiny", 256))
    before = signal.getsignal(number)

    def end() -> None:
        wait_for(lambda: server.started)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=end)
    thread.start()
    with bind("127.0.0.1", 0) as listener:
        run(server, listener)
    thread.join()
    assert server.should_exit
    assert signal.getsignal(number) == before
