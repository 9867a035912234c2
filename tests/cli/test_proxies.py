"""Behind a proxy, servers of this host are still asked directly."""

from __future__ import annotations

import os
import urllib.request

import pytest

from nanochat_ray.cli import proxies

LOOPBACK = "localhost,127.0.0.1,::1"


@pytest.mark.parametrize(
    ("variables", "no_proxy"),
    [
        ({"http_proxy": "http://p:1"}, LOOPBACK),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "a.org, 127.0.0.1"}, f"a.org,{LOOPBACK}"),
        ({"ALL_PROXY": "socks5://p:1", "no_proxy": "a.org,b.org"}, f"a.org,b.org,{LOOPBACK}"),
        ({"http_proxy": "http://p:1", "no_proxy": "*"}, "*"),
        ({"no_proxy": "a.org"}, "a.org"),
        ({"http_proxy": ""}, None),
    ],
)
def test_loopback_needs_no_proxy(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], no_proxy: str | None
) -> None:
    for name in (*proxies.PROXIES, "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):  # what a command starts does it again
        proxies.exempt_loopback()
    hosts = os.environ.get("no_proxy", os.environ.get("NO_PROXY"))
    assert sorted((hosts or "").split(",")) == sorted((no_proxy or "").split(","))
    if no_proxy and "http_proxy" in variables:
        assert all(urllib.request.proxy_bypass(host) for host in ("localhost", "127.0.0.1"))
        assert bool(urllib.request.proxy_bypass("a.net")) == (no_proxy == "*")
