"""Serve a run with OpenAI's API and a chat page.

    nanochat-ray serve --run chat                     # http://127.0.0.1:8000
    ray job submit -- nanochat-ray serve --no-block   # on a cluster; stays when the job has ended
    serve deploy cluster/serve.yaml                     # the same from a file

API keys, if clients shall need one: NANOCHAT_API_KEYS=key1,key2 in the environment.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanochat_ray.checks import check_int, check_port, require
from nanochat_ray.cli import supervise
from nanochat_ray.cli.flags import EVERYDAY, overrides
from nanochat_ray.engine.config import GPU_DEFAULTS, EngineConfig
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.serve import hosts, keys
from nanochat_ray.storage import Store

if TYPE_CHECKING:
    from nanochat_ray.engine.engine import Engine
    from nanochat_ray.serve.local import LocalClient
    from nanochat_ray.text.tokenizer import Tokenizer

    ServeFlags = dict[str, Any]
    EngineFlags = dict[str, Any]
else:
    # The keys come from the environment, so that no list of processes shows them.
    ServeFlags = overrides(ServeConfig, omit=("engine", "key_hashes"), prefix=False)
    EngineFlags = overrides(EngineConfig, derived_fields=("max_num_batched_tokens", "precision"))

EVERYDAY_SERVE = (
    *("storage", "run", "checkpoint", "name", "num_replicas", "max_replicas", "gpus", "threads"),
    *("follow", "num_ingress_replicas", "request_timeout_s", "key_file", "allowed_origins"),
    *("access_log", "suggestions"),
)
EVERYDAY_ENGINE = ("max_num_seqs", "max_model_len", "max_queue_size", "precision")


@dataclass(frozen=True, kw_only=True)
class Args:
    config: ServeFlags = field(default_factory=dict, metadata={EVERYDAY: EVERYDAY_SERVE})
    engine: EngineFlags = field(default_factory=dict, metadata={EVERYDAY: EVERYDAY_ENGINE})
    host: str = "127.0.0.1"
    """Interface of the endpoint; 0.0.0.0 is all of them, :: also those of IPv6: set
    NANOCHAT_API_KEYS then."""
    port: int = 8000
    """Port of the endpoint."""
    ray: bool = True
    """Serve with Ray; --no-ray is one process with one engine."""
    haproxy: bool = True
    """Where this command starts Ray, put HAProxy before the HTTP replicas."""
    block: bool = True
    """Stay until Ctrl-C; --no-block returns once the model answers."""
    restarts: int = 0
    """Times to start again when this process dies. Also when Ray's control service or node does,
    if they were started here."""

    def __post_init__(self) -> None:
        check_port("port", self.port)
        check_int("restarts", self.restarts, 0)
        require(not self.restarts or self.block, "restarts", self.restarts, "0 with --no-block")
        if (gpus := self.config.get("gpus")) and not self.ray:
            import torch

            require(torch.cuda.is_available(), "gpus", gpus, "this machine has no CUDA device")


def config_of(args: Args) -> ServeConfig:
    """What the flags describe, with this command's API keys. Raises ValueError."""
    defaults: dict[str, Any] = {
        "max_num_seqs": EngineConfig.max_num_seqs,
        "max_num_batched_tokens": EngineConfig.max_num_batched_tokens,
    } | (GPU_DEFAULTS if args.config.get("gpus") else {})
    most = args.engine.get("max_num_seqs", defaults["max_num_seqs"])
    # Twice the sequences, so that prompts advance beside a full batch of decodes.
    most_tokens = max(defaults["max_num_batched_tokens"], 2 * most)
    derived_fields = defaults | {"max_num_batched_tokens": most_tokens}
    local_hosts = hosts.LOOPBACK if hosts.is_loopback(args.host) else ()
    return ServeConfig(
        **{"allowed_hosts": local_hosts, **args.config},
        # Those of this command's environment, also where the cluster has been up for long.
        key_hashes=tuple(keys.hash_key(key) for key in keys.from_environment()),
        engine=EngineConfig(**{**derived_fields, **args.engine}),
    )


def key_file_hashes(config: ServeConfig) -> list[str]:
    """Hashes of the API keys in the configuration's file. Raises ValueError."""
    return keys.from_file(config.key_file) if config.key_file else []


def serve_here(config: ServeConfig, args: Args) -> None:
    """The same API over an engine in this process, until Ctrl-C."""
    import torch

    from nanochat_ray.engine.loading import engine_from_run
    from nanochat_ray.machine import engine_threads, run_in_temporary_thread
    from nanochat_ray.serve import access, hosts, http_server
    from nanochat_ray.serve.app import build_app
    from nanochat_ray.serve.collector import freeze_gc
    from nanochat_ray.serve.generation import Limits
    from nanochat_ray.serve.local import LocalClient

    run = Store.at(config.storage).child("runs", config.run)
    name = config.name or config.run
    checkpoint_name = first_checkpoint(config, run)

    def load() -> tuple[Engine, Tokenizer]:
        torch.set_num_threads(config.threads or engine_threads(sharing=1))
        device = "cuda" if config.gpus else "cpu"
        return engine_from_run(run, config.engine, checkpoint_name, device)

    http_server.bind(args.host, args.port).close()  # before the model is loaded
    engine, tokenizer = run_in_temporary_thread(load)
    client = LocalClient(engine)
    print(f"the engine computes with {engine.runner.kernels}", flush=True)
    app = build_app(
        client,
        tokenizer,
        name,
        client.max_model_len,
        limits=Limits(request_timeout_s=config.request_timeout_s),
        keys=[*config.key_hashes, *key_file_hashes(config)],
        allowed_origins=config.allowed_origins,
        allowed_hosts=config.allowed_hosts,
        suggestions=config.suggestions,
    )
    if config.access_log:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        access.log_to([handler])
    freeze_gc()
    listener = http_server.bind(args.host, args.port)
    port = listener.getsockname()[1]
    print(f"{name} is served at {hosts.url_of(args.host, port)}", flush=True)
    try:
        with hold_checkpoint(config, run, client, checkpoint_name):
            http_server.run(http_server.server_of(app), listener)
    finally:
        client.close()


def first_checkpoint(config: ServeConfig, run: Store) -> str:
    """The checkpoint to begin with. Raises ValueError if there is none."""
    from nanochat_ray.checkpoint import checkpoint, follow

    if config.follow:
        return follow.first_checkpoint(run, config.name or config.run, config.follow)
    return checkpoint.resolve(run, config.checkpoint)


@contextlib.contextmanager
def hold_checkpoint(
    config: ServeConfig, run: Store, client: LocalClient, checkpoint_name: str
) -> Iterator[None]:
    """Leases the checkpoint of the engine while the block runs, and follows the run if the
    configuration says so."""
    from nanochat_ray.checkpoint.follow import CheckpointWatcher, NewCheckpoint, ServedCheckpoint
    from nanochat_ray.checkpoint.lease import Lease
    from nanochat_ray.serve.follow import Follower

    name = config.name or config.run
    if not config.follow:
        lease = Lease(run, f"serve-{socket.gethostname()}-{os.getpid()}")
        lease.hold([checkpoint_name])
        try:
            yield
        finally:
            lease.release()
        return

    def roll(new: NewCheckpoint) -> None:
        assert new.weights is not None
        client.swap_weights(new.weights, new.about.version, config.drain_s).result()

    current = ServedCheckpoint.of(run, checkpoint_name)
    watcher = CheckpointWatcher(run, name, config.follow, current, margin=config.follow_margin)
    follower = Follower(watcher, roll)
    client.follow_status = follower.status
    follower.start()
    try:
        yield
    finally:
        follower.close()


def deploy_app(config: ServeConfig, args: Args) -> None:
    """Joins or starts a cluster and deploys the application. ValueError without such a run.

    What need not wait does not: Serve is imported while Ray starts, torch while Serve does, and the
    replicas start while the proxies do.
    """
    from nanochat_ray.on_ray import session

    if not Store.at(config.storage).child("runs", config.run).exists():
        raise ValueError(f"run={config.run!r} has no checkpoint in {config.storage}")
    thread = ThreadPoolExecutor(1)
    try:
        importing = thread.submit(importlib.import_module, "ray.serve")
        session.connect()
        session.check_gpus(config.gpus)
        serve = importing.result()

        from nanochat_ray.on_ray.serve import deploy

        deploy.check_port_is_free(args.host, args.port)
        http_options = {"host": args.host, "port": args.port}
        serve_start = thread.submit(serve.start, http_options=http_options)

        from nanochat_ray.on_ray.serve.deployment import build_application

        application = build_application(config)
        deploy.wait_for_controller(serve_start)
        deploy.deploy(application)
        serve_start.result()
    finally:
        # What Ray does not answer any more would wait a minute.
        thread.shutdown(wait=False, cancel_futures=True)


def main(args: Args) -> int:
    if args.restarts and not supervise.is_child():
        # Any failure may be repeated: what a user can mend ends with another status.
        return supervise.supervise(args.restarts, itertools.count().__next__)
    config = config_of(args)
    if not args.ray:
        serve_here(config, args)
        return 0
    from nanochat_ray.on_ray import ports, session

    if args.haproxy and not session.joins_cluster():
        ports.prefer_haproxy()
    name = config.name or config.run
    deploy_app(config, args)

    from nanochat_ray.on_ray.serve import deploy
    from nanochat_ray.serve import hosts

    url = hosts.url_of(args.host, args.port)
    deploy.wait_until_up(url, name)
    print(f"{name} is served\n  chat page:     {url}\n  OpenAI client: base_url={url}/v1")
    print(f"  terminal:      nanochat-ray chat --url {url}", flush=True)
    if args.block:
        deploy.stay()
    return 0
