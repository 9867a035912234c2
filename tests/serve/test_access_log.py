"""The outermost middleware: request ids, lines of the access log, HEAD, and defects."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from nanochat_ray.serve import access
from nanochat_ray.serve.access import AccessLog
from tests.serve.asgi import call, http


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """The access log, which says that each request took 2.5 ms."""
    lines, logger = Lines(), access.logger
    before = logger.handlers, logger.level, logger.propagate
    ticks = iter([10.0, 10.0025] * 9)
    monkeypatch.setattr(access, "time", type("Clock", (), {"perf_counter": ticks.__next__}))
    access.log_to([lines])
    yield lines
    logger.handlers, logger.level, logger.propagate = before
    logger.manager._clear_cache()


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"hel", "more_body": True})
    await send({"type": "http.response.body", "body": b"lo"})


def header(message: Message, name: bytes) -> list[bytes]:
    return [value for key, value in message["headers"] if key == name]


def test_a_request_is_one_line(log: Lines) -> None:
    start, *bodies = call(AccessLog(hello), http("/a", x_request_id="r1"), b"")
    assert (header(start, b"a"), header(start, b"x-request-id")) == ([b"b"], [b"r1"])
    assert bodies == [
        {"type": "http.response.body", "body": b"hel", "more_body": True},
        {"type": "http.response.body", "body": b"lo"},
    ]
    assert log.lines == ["POST /a 201 2.5 ms 5 bytes id=r1"]


def test_the_log_is_separate(log: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Lines()
    monkeypatch.setattr(logging.getLogger(), "handlers", [root])
    call(AccessLog(hello), http(), b"")
    assert (len(log.lines), root.lines) == (1, [])


def test_nothing_is_logged_below_its_level(log: Lines) -> None:
    access.logger.setLevel(logging.WARNING)
    call(AccessLog(hello), http(), b"")
    assert log.lines == []


@pytest.mark.parametrize("own", ["x" * 128, "A.z:9+/=@-_"])
def test_an_id_is_returned(own: str, log: Lines) -> None:
    start = call(AccessLog(hello), http(x_request_id=own), b"")[0]
    assert header(start, b"x-request-id") == [own.encode()]


@pytest.mark.parametrize("own", ["", "x" * 129, "a b", "ä", "a\nb"])
def test_a_bad_id_is_replaced(own: str, log: Lines) -> None:
    start = call(AccessLog(hello), http(x_request_id=own), b"")[0]
    (value,) = header(start, b"x-request-id")
    assert value != own.encode()
    assert len(value) == 32
    assert log.lines[0].endswith(f"id={value.decode()}")


def test_the_context_has_the_id(log: Lines) -> None:
    ids: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        ids.append(access.request_id.get())

    call(AccessLog(app), http(x_request_id="mine"), b"")
    call(AccessLog(app), http(x_request_id="a\nb"), b"")
    assert (ids[0], len(ids[1])) == ("mine", 32)


def test_head_is_get_without_a_body(log: Lines) -> None:
    methods: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        methods.append(scope["method"])
        await hello(scope, receive, send)

    _, *bodies = call(AccessLog(app), http("/a", "HEAD", x_request_id="r"), b"")
    assert methods == ["GET"]
    assert [message["body"] for message in bodies] == [b"", b""]
    assert log.lines == ["HEAD /a 201 2.5 ms 0 bytes id=r"]


@pytest.mark.parametrize(
    ("scope", "text"),
    [
        ({"raw_path": b"/a%0Ab?key=secret"}, "/a%0Ab"),
        ({"path": "/ä"}, "/\\xc3\\xa4"),
        ({"raw_path": b"/" + 300 * b"a"}, "/" + 199 * "a"),
    ],
)
def test_paths_in_the_log(scope: dict[str, Any], text: str, log: Lines) -> None:
    call(AccessLog(hello), http() | scope, b"")
    assert log.lines[0].split(" ")[1] == text


def test_a_client_that_left_is_499(log: Lines) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientDisconnect

    assert call(AccessLog(app), http("/a", x_request_id="r"), b"") == []
    assert log.lines == ["POST /a 499 2.5 ms 0 bytes id=r"]


def test_a_defect_is_500(log: Lines) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    start, body = call(AccessLog(app), http("/a", x_request_id="r"), b"")
    assert (start["status"], header(start, b"x-request-id")) == (500, [b"r"])
    assert json.loads(body["body"])["error"]["type"] == "server_error"
    size = len(body["body"])
    assert log.lines == ["/a failed, id=r", f"POST /a 500 2.5 ms {size} bytes id=r"]


def test_a_response_cut_short_is_an_error(log: Lines) -> None:
    """The server closes the connection, so that the client does not take it as complete."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="cut short"):
        call(AccessLog(app), http("/a", x_request_id="r"), b"")
    assert log.lines == ["/a failed, id=r", "POST /a 200 2.5 ms 0 bytes id=r"]


def test_panics_are_defects_and_cancellation_is_not(log: Lines) -> None:
    class PanicException(BaseException):
        pass

    class Interruption(BaseException):
        pass

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise scope["error"]

    start = call(AccessLog(app), http() | {"error": PanicException()}, b"")[0]
    assert start["status"] == 500
    with pytest.raises(Interruption):
        call(AccessLog(app), http() | {"error": Interruption()}, b"")


def test_other_scopes_pass(log: Lines) -> None:
    kinds: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        kinds.append(scope["type"])
        await send({"type": "passed"})

    assert call(AccessLog(app), {"type": "lifespan"}, b"") == [{"type": "passed"}]
    assert (kinds, log.lines) == (["lifespan"], [])
