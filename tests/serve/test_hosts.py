"""Requests for another host are refused: DNS rebinding cannot reach a loopback endpoint."""

from __future__ import annotations

import pytest
from starlette.types import Receive, Scope, Send

from nanochat_ray.cli.serve import Args, config_of
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.hosts import LOOPBACK, HostCheck, is_allowed, is_loopback, url_of
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.asgi import call, http
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import get, serving


@pytest.mark.parametrize(
    "header",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST.:80",
        "a.localhost:1",
        "127.0.0.1:8000",
        "[::1]:8000",
    ],
)
def test_loopback_names_are_allowed(header: str) -> None:
    assert is_allowed(header, LOOPBACK)


@pytest.mark.parametrize(
    "header",
    ["evil.example:8000", "localhost.evil.example", "", "127.0.0.1.x", "evil-localhost", "a.evil"],
)
def test_other_names_are_not_allowed(header: str) -> None:
    assert not is_allowed(header, LOOPBACK)
    assert is_allowed("evil.example:8000", ("evil.example",))
    assert not is_allowed("a.evil.example", ("evil.example",))


def test_hosts_have_no_case_and_may_be_missing() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "passed"})

    check = HostCheck(app, hosts=["A.Example"])
    for scope in (http(host="a.EXAMPLE:80"), http(), {"type": "lifespan"}):
        assert call(check, scope, b"") == [{"type": "passed"}]
    assert call(check, http(host="b.example"), b"")[0]["status"] == 421


def test_the_address_of_a_server() -> None:
    assert url_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert url_of("0.0.0.0", 8000) == "http://127.0.0.1:8000"
    assert url_of("::", 80) == url_of("::1", 80) == "http://[::1]:80"


def test_another_host_gets_421() -> None:
    app = build_app(ScriptedClient([65]), Tokenizer.bytes_only(), "m", 64, allowed_hosts=LOOPBACK)
    with serving(app) as url:
        assert get(f"{url}/health").status_code == 200
        response = get(f"{url}/health", headers={"Host": "evil.example"})
    assert response.status_code == 421
    assert response.json()["error"]["code"] == "host_not_allowed"


def test_a_loopback_endpoint_checks_by_default() -> None:
    assert config_of(Args()).allowed_hosts == LOOPBACK
    assert config_of(Args(host="0.0.0.0")).allowed_hosts == ()
    assert config_of(Args(config={"allowed_hosts": ("a.example",)})).allowed_hosts == ("a.example",)
    with pytest.raises(ValueError, match=r"allowed_hosts='a\.example:80' is not allowed"):
        config_of(Args(config={"allowed_hosts": ("a.example:80",)}))
    for host in ("localhost", "::1", "127.0.0.9"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "x"):
        assert not is_loopback(host)
