"""Serve a run with OpenAI's API and a chat page.

    nanochat-ray serve --run chat                     # http://127.0.0.1:8000
    ray job submit -- nanochat-ray serve --no-block   # on a cluster; stays when the job has ended
    serve deploy cluster/serve.yaml                     # the same from a file

API keys, if clients shall need one: NANOCHAT_API_KEYS=key1,key2 in the environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

import ray
from ray import serve

from nanochat_ray.checks import check_float, check_int, check_name, check_port, require
from nanochat_ray.config import with_options
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.machine import engine_threads, run_in_temporary_thread
from nanochat_ray.model.config import Precision
from nanochat_ray.on_ray import session
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.serve.deployment import build_application, prefer_haproxy
from nanochat_ray.serve import keys
from nanochat_ray.serve.auth import check_origins
from nanochat_ray.storage import Store, absolute, default_root
from nanochat_ray.text.tokenizer import Tokenizer

APP = "nanochat"


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds the runs."""
    run: str = "chat"
    checkpoint: str = ""
    """Name of a checkpoint, or best by validation; by default the run's latest."""
    name: str = ""
    """The model's name for clients; by default that of the run."""
    host: str = "127.0.0.1"
    """0.0.0.0 answers every interface: set NANOCHAT_API_KEYS then."""
    port: int = 8000
    num_replicas: int = 1
    """Engine replicas, each with the whole model."""
    max_replicas: int = 0
    """Above --num-replicas: more engines while queues and KV caches are full, up to this."""
    num_ingress_replicas: int = 1
    """HTTP replicas."""
    gpus: float = 0.0
    """GPUs of each engine."""
    threads: int = 0
    """Torch threads of an engine on the CPU; 0 is its part of all cores but one, if the engines are
    all on one machine."""
    precision: Precision | None = None
    """By default bf16 on a GPU, else fp32."""
    max_num_seqs: int = EngineConfig.max_num_seqs
    """Answers that an engine makes at a time."""
    max_model_len: int = 0
    """Longest prompt plus answer; 0 is what the model was trained with."""
    max_num_batched_tokens: int = 0
    """Tokens of one step; 0 is twice max_num_seqs, and at least 256."""
    max_queue_size: int = EngineConfig.max_queue_size
    request_timeout_s: float = 0.0
    """Seconds that an answer may take, waiting and running; 0 is for ever."""
    engine: tuple[str, ...] = ()
    """More fields of EngineConfig, as ``name=value``: num_speculative_tokens=0 kv_layout=paged."""
    ray: bool = True
    """--no-ray: one process with one engine, no replicas; for a look, and to compare."""
    haproxy: bool = True
    """Where this starts Ray itself: HAProxy before the ingresses, not Serve's Python proxy."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose web pages may ask (CORS), such as https://chat.example.org, or *."""
    access_log: bool = True
    """A line for each request: with --no-ray on stderr, else in Serve's log of the ingress."""
    block: bool = True
    """Stay until Ctrl-C; --no-block returns once the model answers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("run", self.run)
        if self.checkpoint:
            check_name("checkpoint", self.checkpoint)
        check_port("port", self.port)
        check_origins("allowed_origins", self.allowed_origins)
        for name, least in (
            *(
                ("num_replicas", 1),
                ("max_replicas", 0),
                ("num_ingress_replicas", 1),
                ("threads", 0),
            ),
            *(
                ("max_num_seqs", 1),
                ("max_model_len", 0),
                ("max_num_batched_tokens", 0),
                ("max_queue_size", 1),
            ),
        ):
            check_int(name, getattr(self, name), least, 1 << 30)
        check_float("gpus", self.gpus)
        check_float("request_timeout_s", self.request_timeout_s)
        if self.gpus and not self.ray:
            import torch

            require(torch.cuda.is_available(), "gpus", self.gpus, "this machine has no CUDA device")


def config_of(args: Args) -> ServeConfig:
    engine = EngineConfig(
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens
        or max(EngineConfig.max_num_batched_tokens, 2 * args.max_num_seqs),
        max_queue_size=args.max_queue_size,
        precision=args.precision or ("bf16" if args.gpus else "fp32"),
    )
    engine, unknown = with_options(engine, args.engine)
    if unknown:
        fields = ", ".join(f.name for f in dataclasses.fields(EngineConfig))
        raise ValueError(f"engine={unknown[0]!r} is not allowed: a field of EngineConfig, {fields}")
    return ServeConfig(
        storage=args.storage,
        run=args.run,
        checkpoint=args.checkpoint,
        name=args.name,
        num_replicas=args.num_replicas,
        max_replicas=args.max_replicas,
        num_ingress_replicas=args.num_ingress_replicas,
        gpus=args.gpus,
        threads=args.threads,
        request_timeout_s=args.request_timeout_s,
        allowed_origins=args.allowed_origins,
        access_log=args.access_log,
        # Those of this command's environment, also where the cluster has been up for long.
        key_hashes=tuple(keys.hash_key(key) for key in keys.from_environment()),
        engine=engine,
    )


def check_port_is_free(args: Args) -> None:
    """ValueError if something else has the port. A Serve that runs already keeps its own."""
    with contextlib.suppress(ValueError):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        return
    try:
        socket.create_server((args.host, args.port)).close()
    except OSError as error:
        raise ValueError(f"port={args.port} on {args.host} cannot be had: {error}") from None


def deploy(app: serve.Application) -> None:
    """Runs ``app`` in place of what was deployed before.

    Raises ValueError with what a replica says that refuses to start.
    """
    try:
        serve.run(app, name=APP, route_prefix="/")
    except RuntimeError as error:
        # Serve has the replica's exception as the text of a trace, here or in its status.
        status = serve.status().applications.get(APP)
        deployments = status.deployments.values() if status else ()
        text = "\n".join([str(error), *(each.message for each in deployments)])
        refusals = re.findall(r"^\s*(?:ValueError|\w*Error: \[Errno \d+\]).*$", text, re.M)
        if not refusals:
            raise
        raise ValueError(refusals[-1].strip().removeprefix("ValueError: ")) from None


def wait_until_up(url: str, name: str, seconds: float = 60.0) -> None:
    """ValueError if ``url`` does not serve ``name`` in time."""
    until = time.monotonic() + seconds
    found = "nothing answers"
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
                model = json.load(response).get("model")
            if model == name:
                return
            found = f"it serves {model!r}"
        except (OSError, ValueError) as error:
            found = str(error)
        time.sleep(0.2)
    raise ValueError(
        f"{url} does not serve {name!r} ({found}); does Serve already run on another port?"
    )


def serve_here(config: ServeConfig, args: Args) -> None:
    """The same API over an engine in this process, until Ctrl-C."""
    import torch

    from nanochat_ray.engine.engine import Engine
    from nanochat_ray.serve import access, http_server
    from nanochat_ray.serve.app import build_app
    from nanochat_ray.serve.collector import freeze_gc
    from nanochat_ray.serve.generation import Limits
    from nanochat_ray.serve.local import LocalClient

    def load() -> tuple[Engine, Tokenizer]:
        torch.set_num_threads(config.threads or engine_threads(sharing=1))
        run = Store.at(config.storage).child("runs", config.run)
        device = "cuda" if config.gpus else "cpu"
        return Engine.from_run(run, config.engine, config.checkpoint, device)

    http_server.bind(args.host, args.port).close()  # before the model is loaded
    engine, tokenizer = run_in_temporary_thread(load)
    client = LocalClient(engine)
    print(f"the engine computes with {engine.runner.kernels}", flush=True)
    app = build_app(
        client,
        tokenizer,
        config.name or config.run,
        client.max_model_len,
        limits=Limits(request_timeout_s=config.request_timeout_s),
        keys=config.key_hashes,
        allowed_origins=config.allowed_origins,
    )
    if args.access_log:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        access.log_to([handler])
    freeze_gc()
    listener = http_server.bind(args.host, args.port)
    host = f"[{args.host}]" if ":" in args.host else args.host
    name, port = config.name or config.run, listener.getsockname()[1]
    print(f"{name} is served at http://{host}:{port}", flush=True)
    try:
        http_server.server_of(app).run(sockets=[listener])
    finally:
        client.close()


def main(args: Args) -> None:
    config = config_of(args)
    if not args.ray:
        serve_here(config, args)
        return
    app = build_application(config)
    if args.haproxy and not session.joins_cluster():
        prefer_haproxy()
    name = config.name or config.run
    session.connect()
    session.check_gpus(config.gpus)
    check_port_is_free(args)
    serve.start(http_options={"host": args.host, "port": args.port})
    deploy(app)
    url = f"http://{'127.0.0.1' if args.host == '0.0.0.0' else args.host}:{args.port}"
    wait_until_up(url, name)
    print(f"{name} is served\n  chat page:     {url}\n  OpenAI client: base_url={url}/v1")
    print(f"  terminal:      nanochat-ray chat --url {url}", flush=True)
    if args.block:
        # A container is ended by SIGTERM, and a shell's background job ignores SIGINT.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
        serve.delete(APP)
