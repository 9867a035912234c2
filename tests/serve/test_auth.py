"""The middleware before a request is read, called as a server calls it."""

from __future__ import annotations

import asyncio
import json
import re
import time

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from nanochat_ray.serve.auth import (
    OPEN_PATHS,
    AuthMiddleware,
    BodySizeLimit,
    check_origins,
    client_of,
)
from nanochat_ray.serve.keys import KeyRing
from tests.serve.asgi import call, http

KEY = "0123456789abcdef"


class App:
    """Records the scopes that reach it, and reads the whole body."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        body, more = b"", scope["type"] == "http"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "passed"})


PASSED = [{"type": "passed"}]


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}0", f"Basic {KEY}", KEY, f"Bearer x {KEY}"],
)
def test_a_wrong_key_is_401(header: str) -> None:
    app = App()
    start, body = call(AuthMiddleware(app, keys=KeyRing([KEY])), http(authorization=header), b"")
    assert start["status"] == 401
    error = json.loads(body["body"])["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert not app.scopes


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY} "])
def test_the_scope_names_the_key(header: str) -> None:
    app = App()
    guard = AuthMiddleware(app, keys=KeyRing(["another", KEY]))
    assert call(guard, http(authorization=header), b"") == PASSED
    name = guard.keys.name_of(KEY.encode())
    assert name
    assert client_of(Request(app.scopes[0])) == name


def test_without_keys_every_request_passes() -> None:
    app = App()
    for scope in (http(), http(authorization="Bearer x")):
        assert call(AuthMiddleware(app, keys=KeyRing([])), scope, b"") == PASSED
    assert [client_of(Request(scope)) for scope in app.scopes] == ["", ""]
    assert client_of(Request(http())) == ""  # no middleware at all


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_open_paths_need_no_key(path: str) -> None:
    app = App()
    guard = AuthMiddleware(app, keys=KeyRing([KEY]))
    assert call(guard, http(path), b"") == PASSED
    assert client_of(Request(app.scopes[0])) == ""
    assert call(guard, http(f"{path}x"), b"")[0]["status"] == 401


@pytest.mark.parametrize(
    ("path", "passes"),
    [
        *(("/m/health", True), ("/m", True), ("/health", True)),
        *(("/m/v1/models", False), ("/m/m/health", False), ("/mhealth", False)),
    ],
)
def test_open_paths_are_below_the_prefix(path: str, passes: bool) -> None:
    guard = AuthMiddleware(App(), keys=KeyRing([KEY]))
    first = call(guard, {**http(path), "root_path": "/m"}, b"")[0]
    assert (first == PASSED[0]) == passes


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_scopes_pass(kind: str) -> None:
    app = App()
    for middleware in (
        AuthMiddleware(app, keys=KeyRing([KEY])),
        BodySizeLimit(app, max_bytes=0, timeout_s=60),
    ):
        assert call(middleware, {"type": kind}, b"") == PASSED
    assert app.scopes == [{"type": kind}] * 2


@pytest.mark.parametrize("parts", [(b"1234567890",), (b"12345", b"67890"), (b"", b"1234567890")])
def test_a_body_of_the_limit_passes(parts: tuple[bytes, ...]) -> None:
    app = App()
    limit = BodySizeLimit(app, max_bytes=10, timeout_s=60)
    for scope in (http(content_length="10"), http(), http(content_length="x")):
        assert call(limit, scope, *parts) == PASSED
    assert app.bodies == [b"1234567890"] * 3


@pytest.mark.parametrize("parts", [(b"12345678901",), (b"12345", b"678901"), (b"1" * 9, b"23")])
def test_a_chunked_body_above_it_is_413(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(HTTPException) as caught:
        call(BodySizeLimit(App(), max_bytes=10, timeout_s=60), http(), *parts)
    assert (caught.value.status_code, caught.value.detail) == (
        413,
        "The body is larger than 10 bytes.",
    )


@pytest.mark.parametrize(
    ("most", "length"), [(10, "11"), (10, "9" * 30), (10**12, "1000000000001")]
)
def test_a_declared_length_above_it_is_413(most: int, length: str) -> None:
    app = App()
    limit = BodySizeLimit(app, max_bytes=most, timeout_s=60)
    start, body = call(limit, http(content_length=length))
    assert start["status"] == 413
    assert f"larger than {most:,} bytes" in json.loads(body["body"])["error"]["message"]
    assert not app.scopes


def test_a_slow_body_is_408() -> None:
    start = time.monotonic()
    with pytest.raises(HTTPException) as caught:
        call(BodySizeLimit(App(), max_bytes=10, timeout_s=0.01), http())
    assert time.monotonic() - start < 30  # and not after the default of a minute
    assert (caught.value.status_code, caught.value.detail) == (
        408,
        "The body did not come within 0.01 s.",
    )


def test_the_time_limit_ends_with_the_body() -> None:
    """An application may wait for the client to leave as long as it answers."""

    async def wait_behind_the_body(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        async with asyncio.timeout(0.05):
            await receive()

    limit = BodySizeLimit(wait_behind_the_body, max_bytes=10, timeout_s=0.01)
    with pytest.raises(TimeoutError):
        call(limit, http(), b"x")


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "https://a.example:8443", "HTTP://a", "chrome-extension://x", "h2+a-b.9://x"],
)
def test_origins_of_browsers_are_allowed(origin: str) -> None:
    check_origins("allowed_origins", [origin])


@pytest.mark.parametrize(
    "origin", ["", "a.example", "https://", "https://a/", "9a://x", "https://a?b", "https://a@b"]
)
def test_other_origins_are_errors(origin: str) -> None:
    message = f"allowed_origins={origin!r} is not allowed: * or scheme://host[:port]"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_origins("allowed_origins", ["*", origin])
