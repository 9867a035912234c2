"""The systems that ``bench serve`` measures: engines and servers of ours, and peers.

Each of ours is a process of its own, so that none takes the interpreter's lock from another.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nanochat_ray.bench import load, load_engine
from nanochat_ray.bench.offline import export_run, pythons
from nanochat_ray.bench.offline_system import PRECISIONS
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
            config = EngineConfig(
                max_num_seqs=STREAMS,
                prefix_cache_tokens=cache_tokens,
                precision=args.precisions[0],
                num_speculative_tokens=num_drafts(run),
            )
            engines[task["prefix"]] = load_engine.make_engine(run, args.threads, config)
        prompts = [load.Prompt(*prompt) for prompt in task["prompts"]]
        began = time.perf_counter()
        results = load_engine.drive(engines[task["prefix"]], prompts, task["concurrency"])
        figures = load.summary(results, time.perf_counter() - began, goals(args))
        print(json.dumps({**figures, "texts": [r.text for r in results]}), flush=True)


@dataclass
class System:
    """Something that takes a load and gives its figures."""

    kind: str
    precision: str
    """Empty if it runs already, with weights that this program does not know."""
    process: Any = None
    url: str = ""
    model: str = ""
    about: str = ""
    """Kernels, draft tokens and version, as far as it says."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.precision}".strip()

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
        rows = [[p.ids, p.output, p.temperature, p.top_p] for p in prompts]
        task = {"prompts": rows, "concurrency": concurrency}
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


def num_drafts(run: Store) -> int:
    """Draft tokens of our engines: none with random weights, which repeat themselves."""
    return EngineConfig.num_speculative_tokens if load_engine.is_trained(run) else 0


def our_command(args: Args, kind: str, precision: str, port: int) -> list[str]:
    if kind == "engine":
        command = ["bench", "serve", "--child", kind, "--precisions", precision]
        for goal in args.goal:
            command += ["--goal", goal]
    else:
        run = Store.at(args.storage).child("runs", args.run)
        command = ["serve", "--engine.max-num-seqs", str(STREAMS), "--port", str(port)]
        command += ["--engine.precision", precision]
        command += ["--engine.num-speculative-tokens", str(num_drafts(run))]
        command += ["--no-ray"] if kind == "local" else []
    command += ["--storage", args.storage, "--run", args.run, "--threads", str(args.threads)]
    return [sys.executable, "-m", "nanochat_ray", *command]


def vllm_command(python: str, folder: Path, precision: str, port: int) -> list[str]:
    module = "vllm.entrypoints.openai.api_server"
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    flags = ["--model", str(folder), "--served-model-name", "bench", "--dtype", dtype]
    flags += ["--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(STREAMS)]
    return [python, "-m", module, *flags, "--disable-log-stats"]


def environment(threads: int) -> dict[str, str]:
    """Variables of a system: one thread waits for nobody, so that it need not spin."""
    settings = {"OMP_NUM_THREADS": str(threads), "RAY_USAGE_STATS_ENABLED": "0"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    passive = {"OMP_WAIT_POLICY": "passive"} if threads == 1 else {}
    return {**os.environ, **settings, **passive}


@contextlib.contextmanager
def child(command: list[str], threads: int, log: Path, pipe: bool) -> Iterator[Any]:
    """A process of its own; with ``pipe`` it answers on standard output, else that is logged."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if pipe else out,
            stderr=None if pipe else out,
            text=True,
            env=environment(threads),
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def kinds_to_start(args: Args) -> list[str]:
    """Ours, then the peers whose server this program can start. Raises ValueError."""
    kinds = args.systems.split(",") if args.systems else []
    for kind in kinds:
        if kind not in SYSTEMS:
            raise ValueError(f"systems={kind!r} is not allowed: {', '.join(SYSTEMS)}")
    if args.ours and "ray" in kinds:
        kinds.remove("ray")
    return kinds + [kind for kind in pythons(args.peer_python) if kind == "vllm"]


@contextlib.contextmanager
def systems(args: Args) -> Iterator[list[System]]:
    """Ours and the peers', all up at once, so that they can take turns."""
    run = Store.at(args.storage).child("runs", args.run)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kinds = kinds_to_start(args)
        open_systems: list[System] = []
        if "vllm" in kinds:
            export_run(work / "model", run)
        for kind, precision in itertools.product(kinds, args.precisions):
            if precision not in PRECISIONS.get(kind, args.precisions):
                continue
            port = args.port + len(open_systems)
            if kind == "vllm":
                python = pythons(args.peer_python)[kind]
                command = vllm_command(python, work / "model", precision, port)
            else:
                command = our_command(args, kind, precision, port)
            log, pipe = work / f"{port}.log", kind == "engine"
            process = stack.enter_context(child(command, args.threads, log, pipe))
            url = "" if pipe else f"http://127.0.0.1:{port}"
            open_systems.append(System(kind, precision, process, url))
        urls = {**({"ray": args.ours} if args.ours else {}), **pairs(args.peer, "peer")}
        for kind, url in urls.items():
            open_systems.append(System(kind, "", url=url.rstrip("/").removesuffix("/v1")))
        for system in open_systems:
            wait_for(system, args, work)
            print(f"{system.name}: {system.about}, {args.threads} threads", flush=True)
        yield open_systems


def wait_for(system: System, args: Args, work: Path) -> None:
    """Waits until a system answers, and sets what is known of it."""
    drafts = num_drafts(Store.at(args.storage).child("runs", args.run))
    if not system.url:
        system.process.stdout.readline()
        system.about = f"{drafts} draft tokens"
        return
    log = work / f"{urlsplit(system.url).port}.log"
    try:
        system.model = load.model_at(system.url, args.key, process=system.process)
    except ValueError as error:
        raise ValueError(f"{error}\n{log.read_text()[-2000:] if log.exists() else ''}") from None
    if system.kind == "vllm":
        version = json.loads(load.fetch(f"{system.url}/version", args.key))["version"]
        text = log.read_text() if log.exists() else ""
        architecture = re.search(r"Resolved architecture: (\w+)", text)
        name = architecture[1] if architecture else "unknown architecture"
        system.about = f"version {version}, {name}, no draft tokens"
    else:
        kernels = re.search(r'kernels="(\w+)"', load.fetch(f"{system.url}/metrics", args.key))
        system.about = f"kernels {kernels[1] if kernels else 'unknown'}, {drafts} draft tokens"
