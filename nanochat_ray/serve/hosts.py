"""Which names a request may call this server by.

A web page can make its own name resolve to 127.0.0.1 (DNS rebinding), and its script then reads an
endpoint that only this machine should reach. Its requests still carry that name in ``Host``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from nanochat_ray.checks import require
from nanochat_ray.serve.openai.errors import ApiError

LOOPBACK = ("localhost",)
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.IGNORECASE)


def check_hosts(field: str, hosts: Sequence[str]) -> None:
    """ValueError for what is no host name."""
    for host in hosts:
        require(_NAME.fullmatch(host) is not None, field, host, "a host name without a port")


def is_loopback(host: str) -> bool:
    """Whether a server that is bound to ``host`` can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(host: str, port: int) -> str:
    """The address by which this machine reaches a server that is bound to ``host``, which may be
    every interface."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_allowed(header: str, hosts: Sequence[str]) -> bool:
    """Whether a ``Host`` header names one of ``hosts`` or a subdomain of localhost, or an address,
    which no name server can redirect."""
    name = header.rpartition(":")[0] if re.search(r":\d*$", header) else header
    name = name.strip("[]").removesuffix(".").lower()
    if name in hosts or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class HostCheck:
    """ASGI middleware that answers 421 to a request for another host; one without ``Host``, which
    no browser sends, passes."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str]):
        self.app = app
        self.hosts = [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name == b"host" and not is_allowed(value.decode("latin-1"), self.hosts):
                    refusal = ApiError(
                        421,
                        "This server does not answer to that Host: --allowed-hosts names more.",
                        code="host_not_allowed",
                    )
                    await refusal.response()(scope, receive, send)
                    return
        await self.app(scope, receive, send)
