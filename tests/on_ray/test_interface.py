"""Which interface gloo uses."""

from __future__ import annotations

import os

import psutil
import pytest

from nanochat_ray.on_ray.interface import GLOO_INTERFACE, interface_of, set_gloo_interface


def test_interface_has_the_address() -> None:
    loopback = interface_of("127.0.0.1")
    assert "127.0.0.1" in [one.address for one in psutil.net_if_addrs()[loopback]]
    assert interface_of("192.0.2.77") == ""  # of documentation (RFC 5737): no host has it


def test_gloo_uses_that_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOO_INTERFACE, "")  # so that what the test sets is removed
    monkeypatch.delenv(GLOO_INTERFACE)
    set_gloo_interface("192.0.2.77")
    assert GLOO_INTERFACE not in os.environ
    set_gloo_interface("127.0.0.1")
    assert os.environ[GLOO_INTERFACE] == interface_of("127.0.0.1")
    monkeypatch.setenv(GLOO_INTERFACE, "chosen0")
    set_gloo_interface("127.0.0.1")
    assert os.environ[GLOO_INTERFACE] == "chosen0"
