"""A deployment carries its whole configuration; the environment of a worker decides nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_ray.cli import serve as job
from nanochat_ray.config import to_json
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.serve import deploy, ingress, replica
from nanochat_ray.on_ray.serve.deployment import build, build_application
from nanochat_ray.serve import keys
from nanochat_ray.storage import Store
from tests.tiny import TOKENIZER, save_model, tiny_config


def write_run(root: Store) -> None:
    model = GPT(tiny_config())
    for step, val_metric in ((1, 2.0), (2, 3.0)):
        save_model(
            root.child("runs", "chat"),
            step,
            model,
            val_metric=val_metric,
            metrics={},
            about={"parent": ""},
        )


def ingress_arguments(application: Any) -> dict[str, Any]:
    return application._bound_deployment.init_kwargs


def test_keys_come_from_the_command(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(root)
    monkeypatch.setenv(keys.VARIABLE, "first-key")
    config = job.config_of(job.Args(config={"storage": root.uri}))
    assert "first-key" not in json.dumps(to_json(config))
    monkeypatch.setenv(keys.VARIABLE, "of-some-worker")  # what builds and serves it has another
    ring = keys.KeyRing(ingress_arguments(build_application(config))["key_hashes"])
    assert ring.name_of(b"first-key")
    assert not ring.name_of(b"of-some-worker")


def test_one_request_too_many_is_429(root: Store) -> None:
    """With Retry-After, as a full engine's; by default Serve answers 503 without."""
    write_run(root)
    application: Any = build_application(ServeConfig(storage=root.uri))
    backpressure = application._bound_deployment._deployment_config.backpressure_config
    assert (backpressure.status_code, backpressure.retry_after_s) == (429, 2.0)


def test_rollouts_keep_no_other_call_out(root: Store) -> None:
    """Serve lets 5 calls into a replica by default; the rollouts of a run may be more."""
    write_run(root)
    application: Any = build_application(ServeConfig(storage=root.uri))
    (engines,) = application._bound_deployment.init_args
    assert engines._bound_deployment._deployment_config.max_ongoing_requests >= 100


def test_the_engines_get_their_share(root: Store) -> None:
    """Of the machine's threads, and of the memory of a GPU that several share."""
    write_run(root)
    engine = EngineConfig(gpu_memory_share=0.9)

    def engines_of(**fields: Any) -> Any:
        config = ServeConfig(storage=root.uri, run="chat", engine=engine, **fields)
        application: Any = build_application(config)
        (engines,) = application._bound_deployment.init_args
        return engines._bound_deployment

    deployment = engines_of(
        num_replicas=2, max_replicas=5, gpus=0.5, cpus=3, name="m", swap_drain_s=4
    )
    arguments = deployment.init_kwargs
    assert arguments["engine"]["gpu_memory_share"] == 0.5
    assert (arguments["device"], arguments["sharing"], arguments["model"]) == ("cuda", 5, "m")
    assert (arguments["drain_s"], arguments["liveness_timeout_s"]) == (4, 10)
    assert deployment.ray_actor_options == {"num_cpus": 3, "num_gpus": 0.5}
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.look_back_period_s) == (2, 5, 15)
    deployment = engines_of(num_replicas=2, swap="immediate")
    arguments = deployment.init_kwargs
    assert (arguments["device"], arguments["sharing"], arguments["model"]) == ("cpu", 2, "chat")
    assert (arguments["engine"]["gpu_memory_share"], arguments["drain_s"]) == (0.9, 0)
    assert deployment.num_replicas == 2
    assert deployment._deployment_config.autoscaling_config is None
    config = deployment._deployment_config
    # Serve waits longer for a replica than that drains.
    assert config.graceful_shutdown_timeout_s > replica.DRAIN_S
    assert (config.health_check_period_s, config.health_check_timeout_s) == (5, 10)


def test_defaults_that_operators_read() -> None:
    config = ServeConfig()
    assert (config.deadline_s, config.liveness_timeout_s, config.swap_drain_s) == (60, 10, 30)
    assert (config.follow_margin, config.request_timeout_s) == (0.05, 0)
    assert (config.num_replicas, config.max_replicas, config.num_ingress_replicas) == (1, 0, 1)


def test_keys_in_a_workers_environment_are_refused(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Serve config file is built in a worker: there the variable is refused."""
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


def test_followers_begin_with_no_named_checkpoint() -> None:
    with pytest.raises(ValueError, match="checkpoint='best' is not allowed: not with follow"):
        ServeConfig(follow="latest", checkpoint="best")


def test_storage_is_absolute_in_a_deployment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ServeConfig(storage="here").storage == str(tmp_path / "here")


def test_the_best_checkpoint_can_be_served(root: Store) -> None:
    write_run(root)
    for choice, name in (("", "step-000002"), ("best", "step-000001"), ("step-000001",) * 2):
        application = build({"storage": root.uri, "checkpoint": choice})
        (engines,) = application._bound_deployment.init_args
        assert engines._bound_deployment.user_config == {"checkpoint": name}
    with pytest.raises(ValueError, match=r"checkpoint='step-000009' is not in .* step-000001"):
        build({"storage": root.uri, "checkpoint": "step-000009"})


def test_missing_runs_and_fields_are_named(root: Store) -> None:
    write_run(root)
    with pytest.raises(ValueError, match="run='other' has no checkpoint"):
        build({"storage": root.uri, "run": "other"})
    with pytest.raises(ValueError, match="no field 'engine_count'"):
        build({"storage": root.uri, "run": "chat", "engine_count": 2})
    with pytest.raises(ValueError, match="max_replicas=1 is not allowed"):
        build({"storage": root.uri, "run": "chat", "num_replicas": 2, "max_replicas": 1})


def test_a_replicas_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(deploy.serve, "status", lambda: status)
    monkeypatch.setattr(deploy.serve, "run", fail(trace))
    with pytest.raises(ValueError, match=r"^checkpoint .* is damaged$"):
        deploy.deploy(None)  # type: ignore[arg-type]
    engine = SimpleNamespace(message=trace)
    status.applications["nanochat"] = SimpleNamespace(deployments={"engine": engine})
    monkeypatch.setattr(deploy.serve, "run", fail("Failed to update the deployments ['engine']."))
    with pytest.raises(ValueError, match=r"^checkpoint .* is damaged$"):
        deploy.deploy(None)  # type: ignore[arg-type]
    engine.message = ""
    monkeypatch.setattr(deploy.serve, "run", fail("KeyError: 'a defect'"))
    with pytest.raises(RuntimeError, match="a defect"):
        deploy.deploy(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("access_log", [True, False])
def test_an_ingress_hands_its_settings_on(
    root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access_log: bool
) -> None:
    """To its client and its app, from what the deployment binds."""
    write_run(root)
    (tmp_path / "keys").write_text("of-the-file\n")
    config = ServeConfig(
        storage=root.uri,
        run="chat",
        name="m",
        key_hashes=(keys.hash_key("of-the-deployment"),),
        key_file=str(tmp_path / "keys"),
        request_timeout_s=9,
        deadline_s=8,
        liveness_timeout_s=7,
        allowed_origins=("https://a.example",),
        allowed_hosts=("h",),
        suggestions=("Hi?",),
        access_log=access_log,
    )
    calls: dict[str, Any] = {}

    def recorder(name: str) -> Any:
        def record(*args: Any, **options: Any) -> Any:
            calls[name] = (args, options)
            return SimpleNamespace(start=recorder("start"))

        return record

    for owner, name in ((ingress, "RayEngineClient"), (ingress, "build_app")):
        monkeypatch.setattr(owner, name, recorder(name))
    monkeypatch.setattr(ingress, "freeze_gc", recorder("freeze_gc"))
    monkeypatch.setattr(ingress.access, "log_to", recorder("log_to"))
    plain: Any = ingress.Ingress.__mro__[1]  # below what Serve adds
    # Without Serve nothing awaits ``__del__``.
    local_ingress: Any = type("LocalIngress", (plain,), {"__del__": lambda self: None})
    one = local_ingress("engines", **ingress_arguments(build_application(config)))
    assert calls["RayEngineClient"] == (
        ("engines",),
        {"deadline_s": 8, "liveness_timeout_s": 7, "follower": None},
    )
    assert ("log_to" in calls) == access_log
    asyncio.run(plain.__serve_build_asgi_app__(one))
    assert {"start", "freeze_gc"} <= calls.keys()
    (client, tokenizer, name, length), options = calls["build_app"]
    assert client is one.client
    assert (tokenizer.fingerprint, name, length) == (TOKENIZER.fingerprint, "m", 32)
    assert options["limits"].request_timeout_s == 9
    ring = keys.KeyRing(options["keys"])
    assert all(ring.name_of(key) for key in (b"of-the-deployment", b"of-the-file"))
    assert options["allowed_origins"] == ["https://a.example"]
    assert (options["allowed_hosts"], options["suggestions"]) == (["h"], ["Hi?"])
