"""What a deployment carries: never what the environment of a worker happens to hold."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.cli import serve as job
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.serve.connection import Connection, Handshakes
from nanochat_ray.on_ray.serve.deployment import build, build_application, settings
from nanochat_ray.on_ray.serve.replica import EngineReplica
from nanochat_ray.serve import keys
from nanochat_ray.storage import Store
from tests.tiny import TOKENIZER, tiny_config


def write_run(root: Store) -> None:
    model = GPT(tiny_config())
    for step, score in ((1, 2.0), (2, 3.0)):
        checkpoint.save(
            root.child("runs", "chat"),
            step,
            model_config=model.config,
            weights=dict(model.named_parameters()),
            optimizer=None,
            trainer={"step": step, "metrics": {}, "about": {"parent": ""}},
            tokenizer=TOKENIZER,
            score=score,
        )


def ingress_arguments(application: Any) -> dict[str, Any]:
    return application._bound_deployment.init_kwargs


def test_keys_come_from_the_command(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(root)
    monkeypatch.setenv(keys.VARIABLE, "first-key")
    config = job.config_of(job.Args(storage=root.uri))
    assert "first-key" not in json.dumps(settings(config))
    monkeypatch.setenv(keys.VARIABLE, "of-some-worker")  # what builds and serves it has another
    ring = keys.KeyRing(ingress_arguments(build_application(config))["key_hashes"])
    assert ring.name_of(b"first-key")
    assert not ring.name_of(b"of-some-worker")


def test_a_variable_of_a_worker_guards_nothing(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Serve config file is built in a worker: there the variable is refused, not believed."""
    write_run(root)
    monkeypatch.setenv(keys.VARIABLE, "of-some-worker")
    args = {"storage": root.uri, "run": "chat"}
    with pytest.raises(ValueError, match="guards no deployment"):
        build(args)
    hashes = [keys.hash_key("mine")]
    assert ingress_arguments(build({**args, "key_hashes": hashes}))["key_hashes"] == hashes
    kwargs = ingress_arguments(build({**args, "key_file": "/run/secrets/keys"}))
    assert kwargs["key_file"] == "/run/secrets/keys"
    monkeypatch.delenv(keys.VARIABLE)
    assert ingress_arguments(build(args))["key_hashes"] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("run", "../x"),
            ("run", ""),
            ("checkpoint", "a/b"),
            ("num_replicas", 0),
            ("num_replicas", "2"),
        ),
        *(("num_ingress_replicas", True), ("max_replicas", -1), ("gpus", -1), ("cpus", "nan")),
        *(("request_timeout_s", float("inf")), ("deadline_s", -1), ("storage", "")),
        *(("key_hashes", ["plain"]), ("threads", 1.5)),
    ],
)
def test_a_wrong_field_of_a_deployment_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        ServeConfig(**{field: value})


def test_storage_is_absolute_in_a_deployment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ServeConfig(storage="here").storage == str(tmp_path / "here")


def test_the_best_checkpoint_can_be_served(root: Store) -> None:
    write_run(root)
    for asked, served in (("", "step-000002"), ("best", "step-000001"), ("step-000001",) * 2):
        application = build({"storage": root.uri, "checkpoint": asked})
        (engines,) = application._bound_deployment.init_args
        assert engines._bound_deployment.user_config == {"checkpoint": served}
    with pytest.raises(ValueError, match=r"checkpoint='step-000009' is not in .* step-000001"):
        build({"storage": root.uri, "checkpoint": "step-000009"})


class Unserved(EngineReplica):
    """Without Serve nobody awaits its end."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


def test_strangers_cannot_lock_an_ingress_out(root: Store) -> None:
    """Connections that never say the secret are bounded in number and in time."""

    async def run() -> None:
        replica = Unserved(root.uri, "chat", {}, "cpu", 1, name="r", host="127.0.0.1")
        replica.handshakes = Handshakes(most=8, seconds=0.5)
        await replica.listen()
        assert replica.server is not None
        address = tuple((await replica.endpoint())["address"])
        strangers = [socket.create_connection(address) for _ in range(40)]
        heard: list[Any] = []
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(
                lambda _, message: heard.append(message[0]), lambda _: heard.append("lost")
            ),
            *address,
        )
        connection.send("handshake", replica.secret, "i")
        async with asyncio.timeout(10):
            while "handshake" not in heard:
                await asyncio.sleep(0.01)
        assert len(replica.handshakes) <= 8
        began = time.monotonic()
        async with asyncio.timeout(10):
            while len(replica.handshakes):
                await asyncio.sleep(0.01)
        assert time.monotonic() - began < 5
        for stranger in strangers:
            stranger.settimeout(5)
            assert await asyncio.to_thread(stranger.recv, 1) == b""
            stranger.close()
        assert "lost" not in heard  # the right one stays
        assert len(replica.connections) == 1
        connection.close()
        replica.server.close()
        for task in replica._tasks:
            task.cancel()

    asyncio.run(run())


def test_what_a_replica_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve reports a replica's exception as the text of a trace."""
    trace = (
        "Deploying application nanochat failed: The deployment failed to start 3 times in a row:\n"
        "Traceback (most recent call last):\n  File 'x', line 1, in __init__\n"
        "ValueError: checkpoint /s/step-1: weights.msgpack is damaged\n"
    )

    def fail(text: str) -> Any:
        def run(*_: Any, **__: Any) -> None:
            raise RuntimeError(text)

        return run

    status = SimpleNamespace(applications={})
    monkeypatch.setattr(job.serve, "status", lambda: status)
    monkeypatch.setattr(job.serve, "run", fail(trace))
    with pytest.raises(ValueError, match=r"^checkpoint .* is damaged$"):
        job.deploy(None)  # type: ignore[arg-type]
    engine = SimpleNamespace(message=trace)
    status.applications["nanochat"] = SimpleNamespace(deployments={"engine": engine})
    monkeypatch.setattr(job.serve, "run", fail("Failed to update the deployments ['engine']."))
    with pytest.raises(ValueError, match=r"^checkpoint .* is damaged$"):
        job.deploy(None)  # type: ignore[arg-type]
    engine.message = ""
    monkeypatch.setattr(job.serve, "run", fail("KeyError: 'a defect'"))
    with pytest.raises(RuntimeError, match="a defect"):
        job.deploy(None)  # type: ignore[arg-type]
