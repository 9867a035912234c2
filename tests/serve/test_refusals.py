"""Requests that are answered from their heads while the engines refuse, over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.server import ServerState

from nanochat_ray.serve import access, gate, protocol
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.connections import ConnectionGuard
from nanochat_ray.serve.generation import Limits
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.asgi import http
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import get, post, serving
from tests.serve.test_access_log import Lines
from tests.serve.test_gate import FULL, Clock

BODY = b'{"prompt": "x"}'
JSON = {"content-type": "application/json"}
KEY = "Authorization: Bearer secret"
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


class FloodServer:
    """A server whose engines have just refused a request, and how many its application saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any):
        for name in ("REFUSAL_S", "MAX_REFUSAL_S"):
            monkeypatch.setattr(gate, name, 1000.0)
        self.engine = ScriptedClient([65, 66])
        self.engine.refuse = FULL
        self._app = build_app(self.engine, Tokenizer.bytes_only(), "m", 256, **options)
        self.state = self._app.state
        self.url = ""
        self.num_calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.num_calls += scope["type"] == "http"
        await self._app(scope, receive, send)

    def begin(self, **headers: str) -> Any:
        """The refusal by the engines."""
        fields = {name.replace("_", "-"): text for name, text in headers.items()}
        answer = post(f"{self.url}/v1/completions", content=BODY, headers=JSON | fields)
        assert answer.status_code == 429
        self.num_calls = 0
        return answer


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FloodServer]]:
    with contextlib.ExitStack() as stack:

        def start(guard: ConnectionGuard | None = None, **options: Any) -> FloodServer:
            server = FloodServer(monkeypatch, **options)
            server.url = stack.enter_context(serving(server, guard))
            return server

        yield start


class Client:
    """One connection, whose server closes it within 60 s if it should."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=60)
        self._file = self._socket.makefile("rb")

    def request(self, *lines: str, body: bytes = b"", path: str = "/v1/completions") -> bytes:
        head = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        return "\r\n".join([*head, *lines, "", ""]).encode() + body

    def send(self, *lines: str, body: bytes = b"", path: str = "/v1/completions") -> None:
        self.send_rest(self.request(*lines, body=body, path=path))

    def send_rest(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self) -> tuple[int, dict[str, str], bytes]:
        """The next response."""
        status = int(self._file.readline().split()[1])
        lines = iter(self._file.readline, b"\r\n")
        headers = dict(line.decode().rstrip().split(": ", 1) for line in lines)
        return status, headers, self._file.read(int(headers["content-length"]))

    def is_at_end(self) -> bool:
        with contextlib.suppress(ConnectionResetError):
            return self._file.read() == b""
        return True

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def connect() -> Iterator[Callable[[FloodServer], Client]]:
    with contextlib.ExitStack() as stack:

        def connect(server: FloodServer) -> Client:
            return stack.enter_context(contextlib.closing(Client(server.url)))

        yield connect


Start, Connect = Callable[..., FloodServer], Callable[[FloodServer], Client]


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_it_is_the_answer_of_the_application(
    keys: tuple[str, ...], start: Start, connect: Connect
) -> None:
    server = start(keys=keys, allowed_hosts=("localhost",))
    headers = {"Authorization": "Bearer secret"} if keys else {}
    answer = server.begin(**headers, x_request_id="r1")
    client = connect(server)
    lines = [KEY] if keys else []
    for path in PATHS:
        client.send(
            *lines, "X-Request-Id: r1", f"Content-Length: {len(BODY)}", body=BODY, path=path
        )
        status, fields, body = client.read()
        assert (status, body) == (429, answer.content)
        fields["date"] = answer.headers["date"]
        assert fields == {**answer.headers, "x-request-id": "r1"}
    assert server.num_calls == 0
    assert server.engine.requests == []


def test_it_is_counted_and_logged(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, log = start(), Lines()
    size = len(server.begin().content)
    monkeypatch.setattr(access.logger, "handlers", [log])
    monkeypatch.setattr(access.logger, "level", 20)
    access.logger.manager._clear_cache()
    client = connect(server)
    client.send("X-Request-Id: r1", "Content-Length: 0")
    client.read()
    assert log.lines[-1:] == [f"POST /v1/completions 429 0.0 ms {size} bytes id=r1"]
    refusals = 'nanochat_request_refusals_total{model_name="m",status="429"} 2.0'
    assert refusals in get(f"{server.url}/metrics").text


def test_the_connection_goes_on(start: Start, connect: Connect) -> None:
    """However the bodies come that nobody reads."""
    server = start()
    server.begin()
    client = connect(server)
    client.send(f"Content-Length: {len(BODY)}", body=BODY[:3])
    assert client.read()[0] == 429
    client.send_rest(BODY[3:])
    client.send("Transfer-Encoding: chunked", body=b"3\r\nabc\r\n")
    assert client.read()[0] == 429
    client.send_rest(b"2\r\nde\r\n0\r\n\r\n")
    client.send("Content-Length: 2")
    assert client.read()[0] == 429
    # The rest, two requests that are refused, and two without a content type, in one packet.
    one = client.request("Content-Length: 2", body=b"{}")
    wrong = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\n\r\n{"
    client.send_rest(b"{}" + 2 * one + 2 * wrong)
    assert [client.read()[0] for _ in range(4)] == [429, 429, 415, 415]
    assert server.num_calls == 2
    client.send(f"Content-Length: {len(BODY)}", body=BODY, path="/tokenize")
    assert client.read()[0] == 200
    assert server.num_calls == 3


@pytest.mark.parametrize(
    "body", [b"GET /version HTTP/1.1\r\nUpgrade: x\r\n\r\n", b"GET /version HTTP/1.0\r\n\r\n"]
)
def test_a_late_body_is_no_request(body: bytes, start: Start, connect: Connect) -> None:
    """Whatever it looks like: its answer would go to the next request of a proxy's connection."""
    server = start()
    server.begin()
    client = connect(server)
    for part in (0, 5):
        client.send(f"Content-Length: {len(body)}", body=body[:part])
        assert client.read()[0] == 429
        client.send_rest(body[part:])
    # Nor is what is behind the body in its packet handed over with it.
    client.send(f"Content-Length: {len(body)}")
    assert client.read()[0] == 429
    one = client.request("Content-Length: 2", body=b"{}")
    client.send_rest(body + one[:40])
    client.send_rest(one[40:])
    assert client.read()[0] == 429
    client.send(f"Content-Length: {len(BODY)}", body=BODY, path="/tokenize")
    status, _, answer = client.read()
    assert (status, json.loads(answer)["count"]) == (200, 2)
    assert server.num_calls == 1


UPGRADE = ("Connection: upgrade", "Upgrade: h2c")
EVIL = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("begin", ["behind a body", "behind a request", "behind empty lines"])
def test_an_offer_that_h11_does_not_get_ends_the_connection(
    begin: str, start: Start, connect: Connect
) -> None:
    """httptools loses its body, or takes it for a request."""
    server = start()
    server.begin()
    client = connect(server)
    offer = client.request(*UPGRADE, f"Content-Length: {len(EVIL)}")
    if begin == "behind a body":
        client.send("Content-Length: 2")
        assert client.read()[0] == 429
        client.send_rest(b"{}" + offer)
    elif begin == "behind a request":
        client.send_rest(client.request("Content-Length: 2", body=b"{}") + offer)
        assert client.read()[0] == 429
    else:
        client.send_rest(b"\r\n\r\n" + offer)
    with contextlib.suppress(OSError):  # it may be closed already
        client.send_rest(EVIL)
    status, headers, _ = client.read()
    assert (status, headers["connection"]) == (429, "close")
    assert client.is_at_end()
    assert server.num_calls == 1


def test_a_large_body_behind_the_rest_of_an_offer_is_no_head(
    start: Start, connect: Connect
) -> None:
    """And an empty line before the offer is nothing."""
    server = start()
    server.begin()
    client = connect(server)
    body = b"{" + bytes(2 * protocol.MAX_HEAD_BYTES)
    request = client.request(*UPGRADE, f"Content-Length: {len(body)}", body=body)
    client.send_rest(b"\r\n" + request[:40])
    client.send_rest(request[40:])
    assert client.read()[0] == 429


def test_no_chunk_behind_a_refusal_ends_the_connection(start: Start, connect: Connect) -> None:
    server = start()
    server.begin()
    client = connect(server)
    client.send("Connection: close", "Transfer-Encoding: chunked")
    assert client.read()[0] == 429
    client.send_rest(b"zz\r\n")
    assert client.is_at_end()


def test_requests_behind_another_get_their_answers_in_order(start: Start, connect: Connect) -> None:
    server = start()
    server.begin()
    client = connect(server)
    length = f"Content-Length: {len(BODY)}"
    requests = [client.request(length, body=BODY, path=p) for p in ("/tokenize", *PATHS[:2])]
    client.send_rest(b"".join(requests))
    assert [client.read()[0] for _ in range(3)] == [200, 429, 429]


def test_a_connection_that_should_close_reads_the_body_before(
    start: Start, connect: Connect
) -> None:
    """To close it in between would reset it, and could lose the answer."""
    server = start()
    server.begin()
    client = connect(server)
    body = b"{" + bytes(1 << 20)
    client.send("Connection: close", f"Content-Length: {len(body)}", body=body[:1])
    status, headers, _ = client.read()
    assert (status, headers["connection"]) == (429, "close")
    client.send_rest(body[1:])
    assert client.is_at_end()
    assert server.num_calls == 0


@pytest.mark.parametrize("line", ["Connection: close", "Connection: keep-alive"])
def test_a_body_that_nobody_reads_must_come_too(
    line: str, start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "DRAIN_S", 0.01)
    server = start(ConnectionGuard(head_timeout_s=1e6))
    server.begin()
    client = connect(server)
    client.send(line, "Content-Length: 9")
    assert client.read()[0] == 429
    client.send_rest(b"{")  # it ends uvicorn's timer of a connection that is kept alive
    assert client.is_at_end()


def test_a_client_must_read_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they would fill the memory: the application waits until it does."""
    server = FloodServer(monkeypatch)

    class Connection(protocol.HttpConnection):
        refusals = server.state.refusals

    async def run() -> None:
        server.state.refusals._gate.record("", 0, FULL)
        config = uvicorn.Config(server, lifespan="off", log_config=None)
        connection = Connection(config, ServerState(), {})
        transport = Mock(is_closing=lambda: False)
        connection.connection_made(transport)
        head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
        connection.data_received(head + b"Content-Length: 0\r\n\r\n")
        assert transport.write.call_count == 1
        connection.pause_writing()
        connection.data_received(3 * (head + b"Content-Length: 0\r\n\r\n"))
        await asyncio.sleep(0)
        assert transport.write.call_count == 1
        assert transport.pause_reading.call_count == 1  # two are in the pipeline
        assert server.num_calls == 1
        connection.connection_lost(None)

        connection = Connection(config, ServerState(), {})
        connection.connection_made(transport)
        connection.pause_writing()
        connection.data_received(head + b"Upgrade: h2c\r\nContent-Length: 0\r\n\r\n")
        (other,) = transport.set_protocol.call_args.args
        assert other.flow.write_paused

    asyncio.run(run())


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["Authorization: Bearer wrong"], 401),
        ([], 401),
        ([KEY, "Content-Encoding: gzip"], 415),
        ([KEY, "Content-Length: 3000000"], 413),
        ([KEY, "Host: rebound.example"], 421),
        ([KEY, "Host: rebound.example", "Host: localhost"], 421),
        ([KEY, "Host:"], 421),
        ([KEY, "Content-Type: text/plain"], 429),
        ([KEY, "Connection: upgrade", "Upgrade: websocket"], 429),
        ([KEY, "Origin: http://page.example"], 429),
        ([KEY, "Expect: 100-continue"], 429),
    ],
)
def test_what_the_application_has_to_look_at(
    lines: list[str], status: int, start: Start, connect: Connect
) -> None:
    server = start(
        keys=("secret",),
        allowed_hosts=("localhost",),
        allowed_origins=("http://page.example",),
        limits=Limits(max_body_bytes=2_000_000),
    )
    server.begin(Authorization="Bearer secret")
    client = connect(server)
    if not any("Content-Length" in line for line in lines):
        lines = [*lines, "Content-Length: 0"]
    client.send(*lines)
    answer, headers, body = client.read()
    assert answer == status
    assert json.loads(body)["error"]["message"]
    assert ("access-control-allow-origin" in headers) == any("Origin" in line for line in lines)
    assert server.num_calls == 1


def test_in_a_flood_few_begin_and_the_others_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    server, clock = FloodServer(monkeypatch), Clock()
    refusals, server.engine.refuse = server.state.refusals, None
    monkeypatch.setattr(refusals._gate, "_clock", clock)

    def arrive(count: int) -> tuple[list[Scope], list[bool]]:
        """Requests in one iteration of the event loop, and which are answered."""
        scopes = [http("/v1/completions", content_type="application/json") for _ in range(count)]
        return scopes, [refusals.answer(b"/v1/completions", each) is not None for each in scopes]

    async def status(scope: Scope) -> int:
        messages: list[Message] = []
        bodies = [BODY]

        async def receive() -> Message:
            if not bodies:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": bodies.pop()}

        async def send(message: Message) -> None:
            messages.append(message)

        await server(scope, receive, send)
        return int(messages[0]["status"])

    async def run() -> None:
        refusals._gate.record("", 0, FULL)
        clock.now += 1000.0 + gate.FLOOD_S / 2
        few = [False] * gate.MAX_STARTS
        scopes, answers = arrive(gate.MAX_STARTS + 3)
        assert answers == [*few, True, True, True]
        # The application does not ask the gate again: it would refuse now.
        assert await status(scopes[0]) == 200
        while arrive(1)[1] == [True]:  # in this iteration
            await asyncio.sleep(0)
        assert arrive(gate.MAX_STARTS)[1] == [*few[1:], True]
        clock.now += gate.FLOOD_S
        assert arrive(3)[1] == [False] * 3  # they wait in the application

    asyncio.run(asyncio.wait_for(run(), 60))
