"""The systems that ``bench serve`` measures: engines and servers of ours, and peers.

Each of ours is a process of its own, so that none takes the interpreter's lock from another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nanochat_ray.bench import load, load_engine
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.storage import Store

if TYPE_CHECKING:
    from nanochat_ray.bench.serve import Args

SYSTEMS = ("engine", "local", "ray")
STREAMS = 32
"""Where throughputs are compared."""


def run_engine(args: Args) -> None:
    """Takes loads as JSON lines and answers each with its figures."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run = Store.at(args.storage).child("runs", args.run)
    engines: dict[bool, Any] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if task["prefix"] not in engines:
            cache_tokens = EngineConfig.prefix_cache_tokens if task["prefix"] else 0
            config = EngineConfig(max_num_seqs=STREAMS, prefix_cache_tokens=cache_tokens)
            engines[task["prefix"]] = load_engine.make_engine(run, args.threads, config)
        prompts = [load.Prompt(*prompt) for prompt in task["prompts"]]
        began = time.perf_counter()
        results = load_engine.drive(engines[task["prefix"]], prompts, task["concurrency"])
        figures = load.summary(results, time.perf_counter() - began, goals(args))
        print(json.dumps({**figures, "texts": [r.text for r in results]}), flush=True)


@contextlib.contextmanager
def _child(args: Args, system: str) -> Iterator[subprocess.Popen[str]]:
    if system == "engine":
        command = ["bench", "serve", "--child", system]
        for goal in args.goal:
            command += ["--goal", goal]
    else:
        command = ["serve", "--engine.max-num-seqs", str(STREAMS)]
        command += ["--port", str(args.port + (system == "ray"))]
        command += ["--no-ray"] if system == "local" else []
    command += ["--storage", args.storage, "--run", args.run, "--threads", str(args.threads)]
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        **({"OMP_WAIT_POLICY": "passive"} if args.threads == 1 else {}),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "nanochat_ray", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if system == "engine" else subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


class System:
    """Something that takes a load and gives its figures."""

    def __init__(self, name: str, *, url: str = "", model: str = "", process: Any = None):
        self.name, self.url, self.model, self.process = name, url, model, process

    def run(
        self, args: Args, prompts: list[load.Prompt], concurrency: int, prefix: bool = True
    ) -> dict[str, Any]:
        if self.url:
            results, seconds = asyncio.run(
                load.drive(
                    self.url,
                    self.model,
                    prompts,
                    concurrency=0 if args.rate else concurrency,
                    rate=args.rate,
                    key=args.key,
                )
            )
            for error in {r.error for r in results if r.error}:
                print(f"{self.name}: {error}", file=sys.stderr)
            return load.summary(results, seconds, goals(args))
        task = {"prompts": [[p.ids, p.output] for p in prompts], "concurrency": concurrency}
        self.process.stdin.write(json.dumps({**task, "prefix": prefix}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{self.name}: its process ended, see above")
        return json.loads(line)


def goals(args: Args) -> dict[str, float]:
    bounds = {}
    for goal in args.goal:
        name, _, bound = goal.partition(":")
        if name not in ("ttft", "tpot", "e2e") or not bound.replace(".", "", 1).isdigit():
            raise ValueError(f"goal={goal!r} is not allowed: ttft:MS, tpot:MS or e2e:MS")
        bounds[name] = float(bound)
    return bounds


def pairs(values: list[str], flag: str) -> dict[str, str]:
    for value in values:
        if not all(value.partition("=")):
            raise ValueError(f"{flag}={value!r} is not allowed: NAME=VALUE")
    return {name: rest for name, _, rest in (value.partition("=") for value in values)}


def model_at(url: str, key: str, seconds: float = 90.0) -> str:
    """The name of the model at ``url``, once it answers."""
    until = time.monotonic() + seconds
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return json.load(response)["data"][0]["id"]
        except (OSError, ValueError) as error:
            if time.monotonic() > until:
                raise ValueError(f"{url} does not answer: {error}") from None
            time.sleep(0.3)


@contextlib.contextmanager
def systems(args: Args) -> Iterator[list[System]]:
    """Ours and the peers', all up at once, so that they can take turns."""
    with contextlib.ExitStack() as stack:
        open_systems = []
        for name in args.systems.split(",") if args.systems else []:
            if name not in SYSTEMS:
                raise ValueError(f"systems={name!r} is not allowed: {', '.join(SYSTEMS)}")
            if name == "ray" and args.ours:
                continue
            process = stack.enter_context(_child(args, name))
            if name == "engine":
                assert process.stdout is not None
                process.stdout.readline()
                open_systems.append(System(name, process=process))
            else:
                url = f"http://127.0.0.1:{args.port + (name == 'ray')}"
                open_systems.append(System(name, url=url, model=model_at(url, args.key)))
        urls = {**({"ray": args.ours} if args.ours else {}), **pairs(args.peer, "peer")}
        for name, url in urls.items():
            url = url.rstrip("/").removesuffix("/v1")
            open_systems.append(System(name, url=url, model=model_at(url, args.key)))
        yield open_systems
