"""``nanochat-ray serve``: where it serves, in which order it starts, and what it leases."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.serve
import torch

from nanochat_ray.checkpoint import checkpoint, follow
from nanochat_ray.checkpoint.lease import leased_checkpoints
from nanochat_ray.cli import serve as command
from nanochat_ray.cli.serve import Args
from nanochat_ray.engine import loading
from nanochat_ray.on_ray import ports, session
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.serve import deploy, deployment
from nanochat_ray.serve import access, app, collector, http_server, keys, local
from nanochat_ray.storage import Store
from tests.on_ray.serve.tiny_run import write_checkpoint
from tests.waiting import wait_for


class Calls:
    """Replaces functions, and remembers which are called, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch, self.names = monkeypatch, list[str]()
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def replace(self, owner: Any, name: str, result: Any = None) -> None:
        def call(*args: Any, **options: Any) -> Any:
            self.names.append(name)
            self.arguments[name] = (*args, *options.values())
            return result

        self.monkeypatch.setattr(owner, name, call)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("haproxy", [True, False])
@pytest.mark.parametrize("block", [True, False])
def test_what_starts_ray_has_haproxy(
    calls: Calls, capsys: pytest.CaptureFixture[str], joins: bool, haproxy: bool, block: bool
) -> None:
    calls.replace(session, "joins_cluster", joins)
    calls.replace(ports, "prefer_haproxy")
    for owner, name in ((command, "deploy_app"), (deploy, "wait_until_up"), (deploy, "stay")):
        calls.replace(owner, name)
    args = Args(config={"run": "mine"}, port=8123, haproxy=haproxy, block=block)
    assert command.main(args) == 0
    assert ("prefer_haproxy" in calls.names) == (haproxy and not joins)
    rest = [n for n in calls.names if n not in ("joins_cluster", "prefer_haproxy")]
    assert rest == ["deploy_app", "wait_until_up", *(["stay"] if block else [])]
    assert calls.arguments["wait_until_up"] == ("http://127.0.0.1:8123", "mine")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine is served"
    assert [line.split()[-1] for line in lines[1:]] == [
        "http://127.0.0.1:8123",
        "base_url=http://127.0.0.1:8123/v1",
        "http://127.0.0.1:8123",
    ]


def test_without_ray_it_serves_here(calls: Calls) -> None:
    calls.replace(command, "serve_here")
    calls.replace(command, "deploy_app")
    assert command.main(Args(config={"run": "mine", "name": "m"}, ray=False)) == 0
    assert calls.names == ["serve_here"]
    assert calls.arguments["serve_here"][0].name == "m"


def test_the_cluster_is_there_before_its_parts(root: Store, calls: Calls) -> None:
    write_checkpoint(root, 0)
    application = object()
    for owner, name, result in (
        *((session, "connect", None), (session, "check_gpus", None), (ray.serve, "start", None)),
        *((deploy, "check_port_is_free", None), (deploy, "wait_for_controller", None)),
        *((deployment, "build_application", application), (deploy, "deploy", None)),
    ):
        calls.replace(owner, name, result)
    config = ServeConfig(storage=root.uri, run="tiny", gpus=0.5)
    command.deploy_app(config, Args(host="0.0.0.0", port=8123))
    # Serve starts beside the others.
    names = [name for name in calls.names if name != "start"]
    assert names == [
        *("connect", "check_gpus", "check_port_is_free", "build_application"),
        *("wait_for_controller", "deploy"),
    ]
    assert calls.arguments["check_gpus"] == (0.5,)
    assert calls.arguments["check_port_is_free"] == ("0.0.0.0", 8123)
    assert calls.arguments["start"] == ({"host": "0.0.0.0", "port": 8123},)
    assert calls.arguments["build_application"] == (config,)
    assert isinstance(calls.arguments["wait_for_controller"][0], Future)
    assert calls.arguments["deploy"] == (application,)
    with pytest.raises(ValueError, match="run='none' has no checkpoint in"):
        command.deploy_app(ServeConfig(storage=root.uri, run="none"), Args())


def test_keys_come_from_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("of-the-file\n")
    monkeypatch.setenv(keys.VARIABLE, "one-key,other-key")
    config = command.config_of(Args(config={"key_file": str(tmp_path / "keys")}))
    for hashes, names in (
        (config.key_hashes, ["one-key", "other-key"]),
        (command.key_file_hashes(config), ["of-the-file"]),
    ):
        ring = keys.KeyRing(list(hashes))
        assert len(hashes) == len(names)
        assert all(ring.name_of(name.encode()) for name in names)
    assert command.key_file_hashes(ServeConfig()) == []


def test_the_first_checkpoint_is_the_named_one(root: Store, calls: Calls) -> None:
    """An endpoint that follows begins with what it served last."""
    for seed in (0, 1):
        write_checkpoint(root, seed)
    run = root.child("runs", "tiny")
    for choice, name in (("", "step-000101"), ("step-000100", "step-000100")):
        config = ServeConfig(storage=root.uri, run="tiny", checkpoint=choice)
        assert command.first_checkpoint(config, run) == name
    calls.replace(follow, "first_checkpoint", "step-000100")
    for name in ("", "m"):
        config = ServeConfig(storage=root.uri, run="tiny", name=name, follow="best")
        assert command.first_checkpoint(config, run) == "step-000100"
        assert calls.arguments["first_checkpoint"] == (run, name or "tiny", "best")


@pytest.mark.parametrize("target", ["", "latest"])
def test_the_served_checkpoint_is_leased(root: Store, target: str) -> None:
    """The training run deletes none that is; the lease and the following end with the block."""
    write_checkpoint(root, 0)
    run = root.child("runs", "tiny")
    config: Any = ServeConfig(storage=root.uri, run="tiny", follow=target)
    client: Any = SimpleNamespace()
    name, before = checkpoint.resolve(run, ""), set(threading.enumerate())

    def new_threads() -> set[str]:
        names = {thread.name for thread in set(threading.enumerate()) - before}
        return names & {"follow", "lease"}

    with command.hold_checkpoint(config, run, client, name):
        wait_for(lambda: leased_checkpoints(run) == {name}, what="the lease")
        wait_for(lambda: new_threads() == ({"follow", "lease"} if target else {"lease"}))
    assert run.list("leases") == []
    assert not new_threads()


@pytest.mark.parametrize("access_log", [True, False])
def test_here_the_flags_reach_the_app(
    root: Store,
    calls: Calls,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    access_log: bool,
) -> None:
    write_checkpoint(root, 0)
    (tmp_path / "keys").write_text("a-key\n")
    address = ("127.0.0.1", 8123)
    runs: list[Any] = []
    listener = SimpleNamespace(close=lambda: runs.append("free"), getsockname=lambda: address)
    engine = SimpleNamespace(runner=SimpleNamespace(kernels="amx"))
    client = SimpleNamespace(max_model_len=77, close=lambda: runs.append("close"))
    server = SimpleNamespace(
        run=lambda sockets: runs.append(sockets), handle_exit=signal.default_int_handler
    )
    for owner, name, result in (
        *((http_server, "bind", listener), (http_server, "server_of", server)),
        *((loading, "engine_from_run", (engine, "tokenizer")), (local, "LocalClient", client)),
        *((app, "build_app", "app"), (collector, "freeze_gc", None), (access, "log_to", None)),
        (torch, "set_num_threads", None),
    ):
        calls.replace(owner, name, result)
    flags = {"storage": root.uri, "run": "tiny", "threads": 3, "request_timeout_s": 9.0}
    flags |= {"key_file": str(tmp_path / "keys"), "suggestions": ("Hi?",), "access_log": access_log}
    flags |= {"allowed_origins": ("https://a.example",), "allowed_hosts": ("h",)}
    args = Args(config=flags, ray=False, port=8123)
    config = command.config_of(args)
    command.serve_here(config, args)
    assert calls.arguments["bind"] == address
    run = root.child("runs", "tiny")
    assert calls.arguments["engine_from_run"] == (run, config.engine, "step-000100", "cpu")
    assert calls.arguments["set_num_threads"] == (3,)
    assert calls.arguments["LocalClient"] == (engine,)
    *first, limits, hashes, origins, names, suggestions = calls.arguments["build_app"]
    assert first == [client, "tokenizer", "tiny", 77]
    assert limits.request_timeout_s == 9
    assert keys.KeyRing(hashes).name_of(b"a-key")
    assert (origins, names, suggestions) == (("https://a.example",), ("h",), ("Hi?",))
    assert calls.arguments["server_of"] == ("app",)
    assert runs == ["free", [listener], "close"]
    assert ("log_to" in calls.names) == access_log
    assert capsys.readouterr().out.splitlines() == [
        "the engine computes with amx",
        "tiny is served at http://127.0.0.1:8123",
    ]
