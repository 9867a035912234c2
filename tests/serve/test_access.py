"""Around requests: ids, the access log, CORS, HEAD, upgrades, slow clients, an address in use."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from nanochat_ray.serve import access, http_server
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.auth import check_origins
from nanochat_ray.serve.generation import Limits
from nanochat_ray.serve.http_server import bind, server_of
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import get, head, post, serving
from tests.waiting import wait_for

TOK = Tokenizer.bytes_only()
ORIGIN = "https://chat.example.org"
KEY = "sk-very-secret"
AUTH = {"authorization": f"Bearer {KEY}"}


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Lines:
    lines = Lines()
    for name, value in (("handlers", [lines]), ("level", logging.INFO), ("propagate", False)):
        monkeypatch.setattr(access.logger, name, value)
    access.logger.manager._clear_cache()
    return lines


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient([65])


@pytest.fixture
def url(engine: ScriptedClient) -> Iterator[str]:
    app = build_app(engine, TOK, "tiny", 256, keys=[KEY], allowed_origins=[ORIGIN])
    with serving(app) as url:
        yield url


def test_request_ids_are_kept_or_made(url: str) -> None:
    response = get(f"{url}/health", headers={"x-request-id": "abc-1:2"})
    assert response.headers["x-request-id"] == "abc-1:2"
    for bad in ("", "x" * 129, "a b", "<script>", "a;b"):
        own = get(f"{url}/v1/nothing", headers={"x-request-id": bad} if bad else {})
        assert own.headers["x-request-id"] != bad
        assert len(own.headers["x-request-id"]) == 32


def test_access_log_tells_no_secret(url: str, log: Lines) -> None:
    body = {"prompt": "a private question", "max_tokens": 3}
    post(f"{url}/v1/completions?key={KEY}", json=body, headers={**AUTH, "x-request-id": "r1"})
    post(f"{url}/v1/completions", json=body)
    get(f"{url}/a%0Ab", headers=AUTH)
    wait_for(lambda: len(log.lines) == 3)
    first, second, third = log.lines
    assert first.startswith("POST /v1/completions 200 ")
    assert first.endswith(" id=r1")
    assert second.startswith("POST /v1/completions 401 ")
    assert third.startswith("GET /a%0Ab 404 ")
    assert not any(word in "".join(log.lines) for word in (KEY, "private", "\n"))


def test_a_panic_is_an_openai_error(url: str, engine: ScriptedClient, log: Lines) -> None:
    class PanicException(BaseException):
        pass

    for error in (PanicException("index out of bounds"), ZeroDivisionError("a defect")):
        engine.refuse = error  # type: ignore[assignment]
        response = post(f"{url}/v1/completions", json={"prompt": "x"}, headers=AUTH)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert response.headers["x-request-id"] in "".join(log.lines)


def test_cors_is_for_allowed_origins(url: str) -> None:
    preflight_headers = {"origin": ORIGIN, "access-control-request-method": "POST"}
    preflight_headers["access-control-request-headers"] = "authorization, content-type"
    preflight = httpx.options(f"{url}/v1/chat/completions", headers=preflight_headers)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    response = post(f"{url}/v1/completions", json={}, headers={"origin": ORIGIN})
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == ORIGIN
    other = get(f"{url}/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_cors_is_off_by_default() -> None:
    with serving(build_app(ScriptedClient([65]), TOK, "tiny", 256)) as url:
        assert "access-control-allow-origin" not in get(url, headers={"origin": ORIGIN}).headers


@pytest.mark.parametrize("origin", ["chat.example.org", "https://a/b", "", "https://a b"])
def test_origins_are_checked(origin: str) -> None:
    with pytest.raises(ValueError, match="allowed_origins"):
        check_origins("allowed_origins", ["*", ORIGIN, origin])


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/v1/models", "/metrics"])
def test_head_is_get_without_a_body(url: str, path: str) -> None:
    response = head(f"{url}{path}", headers=AUTH)
    assert response.status_code == 200
    assert response.content == b""
    assert (
        response.headers["content-type"]
        == get(f"{url}{path}", headers=AUTH).headers["content-type"]
    )
    assert head(f"{url}/v1/completions", headers=AUTH).status_code == 405


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def test_an_offer_of_h2c_keeps_the_body(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Protocol(http_server._H11):
        def data_received(self, data: bytes) -> None:
            sizes.append(len(data))
            super().data_received(data)

    monkeypatch.setattr(http_server._Protocol, "h11_class", Protocol)
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
        b"Authorization: Bearer " + KEY.encode() + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with connect(url) as sock:
        for apart in (False, True):  # one connection, one write or two
            sock.sendall(head if apart else head + body)
            if apart:
                wait_for(lambda: sum(sizes) == 2 * len(head) + len(body), what="the head")
                sock.sendall(body)
            answer = b""
            while b"usage" not in answer:
                part = sock.recv(65536)
                assert part, answer
                answer += part
            assert answer.startswith(b"HTTP/1.1 200")


def test_a_body_that_never_ends_is_408(engine: ScriptedClient) -> None:
    app = build_app(engine, TOK, "tiny", 256, limits=Limits(body_timeout_s=0.1))
    with serving(app) as url, connect(url) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer " + KEY.encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\n{\r\n"
        )
        assert sock.recv(65536).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_a_client_that_does_not_read_ends() -> None:
    engine = ScriptedClient([65] * 100_000)
    server, listener = server_of(build_app(engine, TOK, "tiny", 200_000)), bind("127.0.0.1", 0)
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    body = b'{"prompt": "x", "stream": true, "max_tokens": 100000}'
    with socket.create_connection(listener.getsockname()) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        wait_for(lambda: bool(engine.running))
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
    assert not server.server_state.connections


def test_an_address_in_use_is_one_error() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port={port} .* not allowed: .*use"):
            bind("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"host=192\.0\.2\.1"):
        bind("192.0.2.1", 0)
