"""A model on Ray Serve: ingress replicas speak HTTP, engine replicas generate tokens.

    serve deploy cluster/serve.yaml        # args: the fields of ServeConfig
    nanochat-ray serve --run chat          # the same, from flags

Ingresses and engines are separate deployments, so that each scales by itself and the death of an
engine replica does not end the connections of clients: see ``client``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig

from nanochat_ray.checkpoint import checkpoint, follow
from nanochat_ray.config import from_json, to_json
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.serve import autoscaling, http_server
from nanochat_ray.on_ray.serve.follow import FollowDeployment
from nanochat_ray.on_ray.serve.ingress import Ingress
from nanochat_ray.on_ray.serve.replica import EngineReplica
from nanochat_ray.serve import keys
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import folder_of

LOOK_BACK_S = 15.0
"""Autoscaling averages the loads of the replicas over this time; they arrive every 10 s."""
GRACEFUL_SHUTDOWN_S = 30.0
"""How long Serve waits for a replica that it stops, which drains for ``replica.DRAIN_S``."""

MAX_REQUESTS = 4_096
"""Of an ingress at a time: as many as HAProxy has connections, or clients that send slowly would
use up what the others need. The queues of the engines bound what waits for them."""
MAX_ENGINE_CALLS = 1_000
"""Of an engine replica at a time, through Ray. Rollouts take minutes: with Serve's default of 5
they would keep out ``endpoint``, ``status`` and ``swap``, and the ingresses would lose a replica
that is well. ``max_queue_size`` bounds the requests of users, which come by other connections."""
RETRY_AFTER_S = 2.0
"""For a client whose request is one too many."""
INGRESS_ENVIRONMENT = {
    # Nothing here blocks. A separate thread would pass every chunk on, which adds 6 ms to the time
    # to first token (BENCHMARKS.md).
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # uvloop accepts one connection in an iteration of its event loop (libuv since 1.47), asyncio
    # all that wait. In a flood they waited for seconds to be refused (BENCHMARKS.md).
    "RAY_USE_UVLOOP": "0",
    **http_server.ENVIRONMENT,
}


def build_application(config: ServeConfig) -> Application:
    """The Serve application. Raises ValueError for a run or checkpoint that does not exist."""
    root = Store.at(config.storage)
    run = root.child("runs", config.run)
    if checkpoint.latest(run) is None:
        raise ValueError(f"run={config.run!r} has no checkpoint in {config.storage}")
    if config.follow:
        name = follow.first_checkpoint(run, config.name or config.run, config.follow)
    else:
        name = checkpoint.resolve(run, config.checkpoint)
    run_config = checkpoint.load_config(run, name)
    # Serve restarts an ingress whose arguments change. With a path that does not depend on the
    # checkpoint, new weights need no restart.
    tokenizer = folder_of(root, run_config.tokenizer)
    if not tokenizer.exists("tokenizer.json"):
        tokenizer = run.child(name)
    engines = _engine_application(config, name)
    return _ingress_deployment(config).bind(
        engines,
        follower=_follow_application(config, engines) if config.follow else None,
        tokenizer=tokenizer.uri,
        fingerprint=run_config.tokenizer,
        name=config.name or config.run,
        max_model_len=config.engine.max_model_len or run_config.model.sequence_len,
        key_hashes=list(config.key_hashes),
        key_file=config.key_file,
        deadline_s=config.deadline_s,
        liveness_timeout_s=config.liveness_timeout_s,
        request_timeout_s=config.request_timeout_s,
        allowed_origins=list(config.allowed_origins),
        allowed_hosts=list(config.allowed_hosts),
        suggestions=list(config.suggestions),
        access_log=config.access_log,
    )


def _engine_application(config: ServeConfig, checkpoint_name: str) -> Application:
    # Replicas with half a GPU each share its memory.
    share = min(config.engine.gpu_memory_share, config.gpus or 1.0)
    engine = dataclasses.replace(config.engine, gpu_memory_share=share)
    deployment = serve.deployment(
        name="engine",
        **_replicas(config),
        max_ongoing_requests=MAX_ENGINE_CALLS,
        user_config={"follow": config.follow} if config.follow else {"checkpoint": checkpoint_name},
        health_check_period_s=5,
        health_check_timeout_s=config.liveness_timeout_s,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        # Ingresses ask every few seconds for the address.
        logging_config=LoggingConfig(enable_access_log=False),
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
    )(EngineReplica)
    return deployment.bind(
        storage=config.storage,
        run=config.run,
        engine=to_json(engine),
        device="cuda" if config.gpus else "cpu",
        threads=config.threads,
        sharing=max(config.num_replicas, config.max_replicas),
        model=config.name or config.run,
        drain_s=config.drain_s,
        liveness_timeout_s=config.liveness_timeout_s,
    )


def _follow_application(config: ServeConfig, engines: Application) -> Application:
    """What swaps the checkpoint of the engines."""
    deployment = serve.deployment(
        name="follow",
        num_replicas=1,
        user_config={"target": config.follow, "margin": config.follow_margin},
        logging_config=LoggingConfig(enable_access_log=False),
        ray_actor_options={"num_cpus": config.ingress_cpus},
    )(FollowDeployment)
    return deployment.bind(
        engines,
        storage=config.storage,
        run=config.run,
        name=config.name or config.run,
        drain_s=config.drain_s,
    )


def _ingress_deployment(config: ServeConfig) -> serve.Deployment:
    return serve.deployment(
        name="ingress",
        num_replicas=config.num_ingress_replicas,
        max_ongoing_requests=MAX_REQUESTS,
        # Serve's own answer to one more: 503 without Retry-After by default.
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        logging_config=LoggingConfig(enable_access_log=False),
        ray_actor_options={
            "num_cpus": config.ingress_cpus,
            "runtime_env": {"env_vars": dict(INGRESS_ENVIRONMENT)},
        },
    )(Ingress)


def _replicas(config: ServeConfig) -> dict[str, Any]:
    """The number of engine replicas as arguments of ``serve.deployment``."""
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


def build(args: Mapping[str, Any]) -> Application:
    """For ``import_path`` of a Serve config file; ``args`` has the fields of ServeConfig."""
    config = from_json(ServeConfig, args)
    if keys.from_environment() and not (config.key_hashes or config.key_file):
        # This runs in a worker, whose environment is not that of the deployment. Ignoring the
        # variable would leave an endpoint open that its owner believes to be closed.
        raise ValueError(
            f"{keys.VARIABLE} in a cluster's environment guards no deployment: give key_hashes "
            "(python -m nanochat_ray.serve.keys prints them) or key_file in args"
        )
    return build_application(config)
