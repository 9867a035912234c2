"""HTTP proxies that the environment names."""

from __future__ import annotations

import os

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def exempt_loopback() -> None:
    """Keeps urllib, requests and httpx, in this process and in those that it starts, from asking a
    proxy for servers of this host. That proxy would look for them on its own."""
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        return
    text = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host for host in map(str.strip, text.split(",")) if host]
    if "*" in hosts:  # all of them
        return
    hosts += [host for host in LOOPBACK if host not in hosts]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)
