"""Measure serving: the engine in process, one plain server, Ray Serve and peers, side by side.

    nanochat-ray bench serve                                     # a fresh model of 14 M weights
    nanochat-ray bench serve --peer vllm=http://127.0.0.1:8001   # the same load, another server
    nanochat-ray bench serve --only http --sides ray --rate 4    # open loop, Poisson arrivals
    nanochat-ray bench serve --only offline --peer-python vllm=/envs/vllm/bin/python

The protocol is that of ``vllm bench serve`` (see ``bench.load``): random ids of random lengths, the
end of a turn ignored, greedy. Systems take turns within each repeat; figures are medians over the
repeats. A peer must serve the same weights: ``nanochat-ray export`` writes them; --storage and
--run name the run, which is made if it does not exist. The last line is one JSON object, with null
for what was not measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_ray.bench import load, load_engine, offline
from nanochat_ray.bench.chart import lines_svg
from nanochat_ray.checks import check_float, check_int, check_name, check_port
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.storage import Store

KEYS = (
    *("decode_vs_vllm", "decode_vs_transformers", "http_vs_vllm", "prefix_speedup"),
    *("serve_first_token_ms", "serve_throughput_share"),
)
SIDES = ("engine", "local", "ray")
STREAMS = 32
"""Where throughputs are compared."""
VOCAB = 2000
"""Ids below it are in every model's vocabulary and are no special ones."""


@dataclass(frozen=True, kw_only=True)
class Args:
    only: str = "http,prefix"
    """Parts, separated by commas: http, long, prefix, offline."""
    sides: str = "engine,local,ray"
    """What of ours is measured over HTTP: the engine in process, serve.local under uvicorn, Ray
    Serve. --ours adds a server that runs already."""
    ours: str = ""
    """URL of a server of ours, in place of "ray"."""
    peer: list[str] = field(default_factory=list)
    """NAME=URL of other servers of the same weights; "vllm" fills the key http_vs_vllm."""
    peer_python: list[str] = field(default_factory=list)
    """NAME=PATH of the Python of an offline peer: see nanochat-ray bench offline."""
    key: str = ""
    """API key for all servers."""
    storage: str = ""
    """Where the run is; by default a temporary folder."""
    run: str = "bench"
    concurrency: tuple[int, ...] = (1, 16, STREAMS)
    rate: float = 0.0
    """Requests per second; 0 is a closed loop."""
    prompt: int = 128
    output: int = 64
    spread: float = 0.5
    """Lengths lie uniformly within this share around those two."""
    requests: int = 2
    """Requests for each stream, and at least 8."""
    shared_prefix: int = 512
    own: int = 32
    shared_output: int = 16
    """The shared-prefix load: tokens that are shared, a prompt's own, and of the answer."""
    goal: list[str] = field(default_factory=list)
    """Goodput: ttft:MS, tpot:MS or e2e:MS."""
    repeats: int = 3
    threads: int = 1
    """Torch threads of each of our engines."""
    port: int = 8390
    """Of the servers that are started: this one and the next."""
    chart: Path | None = None
    """Where to write tokens/s by streams as an SVG."""
    out: Path | None = None
    """Where to write all figures by side and streams, as JSON."""
    child: str = ""
    """Internal: the side that this process is."""

    def __post_init__(self) -> None:
        check_name("run", self.run)
        check_port("port", self.port)
        for name in ("requests", "repeats", "threads", "prompt", "output", "own", "shared_output"):
            check_int(name, getattr(self, name), 1)
        check_int("shared", self.shared_prefix, 0)
        for streams in self.concurrency:
            check_int("concurrency", streams, 1)
        check_float("rate", self.rate)
        check_float("spread", self.spread, 0, 1)


# ---- our sides, each a process of its own


def be_engine(args: Args) -> None:
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
def child(args: Args, side: str) -> Iterator[subprocess.Popen[str]]:
    if side == "engine":
        command = ["bench", "serve", "--child", side]
        for goal in args.goal:
            command += ["--goal", goal]
    else:
        command = ["serve", "--engine.max-num-seqs", str(STREAMS)]
        command += ["--port", str(args.port + (side == "ray"))]
        command += ["--no-ray"] if side == "local" else []
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
        stdout=subprocess.PIPE if side == "engine" else subprocess.DEVNULL,
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


# ---- the measurement


class Side:
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
def sides(args: Args) -> Iterator[list[Side]]:
    """Ours and the peers', all up at once, so that they can take turns."""
    with contextlib.ExitStack() as stack:
        open_sides = []
        for name in args.sides.split(",") if args.sides else []:
            if name not in SIDES:
                raise ValueError(f"sides={name!r} is not allowed: {', '.join(SIDES)}")
            if name == "ray" and args.ours:
                continue
            process = stack.enter_context(child(args, name))
            if name == "engine":
                assert process.stdout is not None
                process.stdout.readline()
                open_sides.append(Side(name, process=process))
            else:
                url = f"http://127.0.0.1:{args.port + (name == 'ray')}"
                open_sides.append(Side(name, url=url, model=model_at(url, args.key)))
        urls = {**({"ray": args.ours} if args.ours else {}), **pairs(args.peer, "peer")}
        for name, url in urls.items():
            url = url.rstrip("/").removesuffix("/v1")
            open_sides.append(Side(name, url=url, model=model_at(url, args.key)))
        yield open_sides


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [k for k, v in runs[0].items() if isinstance(v, (int, float))]
    return {name: statistics.median(run[name] for run in runs) for name in numbers}


def measure_http(args: Args, open_sides: list[Side]) -> dict[str, dict[int, dict[str, Any]]]:
    """Median figures by side and streams."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for repeat in range(-1, args.repeats):  # the first one warms up
        for streams in args.concurrency:
            count = max(8, args.requests * streams) if repeat >= 0 else min(8, streams)
            prompts = load.random_prompts(
                count,
                vocab=VOCAB,
                prompt=args.prompt,
                output=args.output,
                spread=args.spread,
                seed=1000 * repeat + streams,
            )
            for side in (
                open_sides[repeat % len(open_sides) :] + open_sides[: repeat % len(open_sides)]
            ):
                figures = side.run(args, prompts, streams)
                if repeat >= 0:
                    runs.setdefault((side.name, streams), []).append(figures)
    return {
        side.name: {streams: medians(runs[side.name, streams]) for streams in args.concurrency}
        for side in open_sides
    }


def measure_prefix(args: Args, engine: Side) -> tuple[float, bool]:
    """Throughput of the shared-prefix load with the cache over that without; equal answers?"""
    ratios, equal = [], True
    for repeat in range(-1, args.repeats):
        prompts = load.shared_prefix_prompts(
            2 * STREAMS,
            vocab=VOCAB,
            shared_prefix=args.shared_prefix,
            own=args.own,
            output=args.shared_output,
            seed=repeat,
        )
        first, second = ((True, False), (False, True))[repeat % 2]
        figures = {on: engine.run(args, prompts, STREAMS, on) for on in (first, second)}
        equal = equal and figures[True]["texts"] == figures[False]["texts"]
        if repeat >= 0:
            ratios.append(figures[True]["tokens_per_s"] / figures[False]["tokens_per_s"])
    return statistics.median(ratios), equal


def measure_long(args: Args, open_sides: list[Side]) -> dict[str, float]:
    """By server: what a prompt of 1,900 tokens makes 16 answers wait, in median steps."""
    waits: dict[str, list[float]] = {side.name: [] for side in open_sides if side.url}
    for repeat in range(args.repeats):
        for side in open_sides:
            if side.url:
                wait = load.long_prompt_delay(
                    side.url, side.model, vocab=VOCAB, key=args.key, seed=repeat
                )
                waits[side.name].append(asyncio.run(wait))
    return {name: statistics.median(of) for name, of in waits.items()}


def table(figures: dict[str, dict[int, dict[str, Any]]]) -> str:
    columns = ("requests_per_s", "tokens_per_s", "all_tokens_per_s")
    times = [f"{name}_p{share}_ms" for name in ("ttft", "tpot", "itl", "e2e") for share in (50, 99)]
    extra = ("ttft_p90_ms", "itl_p90_ms", "goodput_per_s", "failed")
    lines = []
    for side, by_streams in figures.items():
        for streams, metrics in by_streams.items():
            cells = [f"{metrics[c]:9.1f}" for c in (*columns, *times, *extra) if c in metrics]
            lines.append(f"{side:>10} {streams:>7} " + " ".join(cells))
    some = next(iter(next(iter(figures.values())).values()))
    names = [c for c in (*columns, *times, *extra) if c in some]
    short = [
        c.removesuffix("_ms").replace("tokens_per_s", "tok/s").replace("_per_s", "/s")
        for c in names
    ]
    head = f"{'':>10} {'streams':>7} " + " ".join(f"{name:>9}" for name in short)
    return "\n".join([head, *lines])


def http_part(args: Args, open_sides: list[Side]) -> dict[str, Any]:
    figures = measure_http(args, open_sides)
    print(table(figures), flush=True)
    if args.chart is not None:
        curves = {
            side: [(float(n), f["tokens_per_s"]) for n, f in by_streams.items()]
            for side, by_streams in figures.items()
        }
        args.chart.write_text(lines_svg("tokens/s by streams", curves))
    result: dict[str, Any] = {}
    most, least = max(args.concurrency), min(args.concurrency)
    if "engine" in figures and "ray" in figures:
        ours, engine = figures["ray"], figures["engine"]
        result["serve_first_token_ms"] = ours[least]["ttft_p50_ms"] - engine[least]["ttft_p50_ms"]
        result["serve_throughput_share"] = ours[most]["tokens_per_s"] / engine[most]["tokens_per_s"]
    best = next((name for name in ("ray", "local") if name in figures), None)
    if best and "vllm" in figures:
        theirs = figures["vllm"][most]
        result["http_vs_vllm"] = figures[best][most]["tokens_per_s"] / theirs["tokens_per_s"]
        result["itl_p99_vs_vllm"] = figures[best][most]["itl_p99_ms"] / theirs["itl_p99_ms"]
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1))
    return result


def round_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: round_values(one) for key, one in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def main(args: Args) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the sides are ended too
    if args.child:
        be_engine(args)
        return
    parts = args.only.split(",")
    if unknown := set(parts) - {"http", "long", "prefix", "offline"}:
        raise ValueError(f"only={sorted(unknown)} is not allowed: http, long, prefix, offline")
    goals(args)
    result: dict[str, Any] = dict.fromkeys(KEYS)
    with contextlib.ExitStack() as stack:
        if not args.storage:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            args = dataclasses.replace(args, storage=folder)
        load_engine.make_run(Store.at(args.storage).child("runs", args.run))
        if {"http", "long"} & set(parts):
            with sides(args) as open_sides:
                result.update(http_part(args, open_sides) if "http" in parts else {})
                result["long_prompt_delay"] = (
                    measure_long(args, open_sides) if "long" in parts else None
                )
        if "prefix" in parts:
            with sides(dataclasses.replace(args, sides="engine", peer=[])) as open_sides:
                speedup, equal = measure_prefix(args, open_sides[0])
            print(f"shared prefix: {speedup:.2f} times the throughput, answers equal: {equal}")
            result.update(prefix_speedup=speedup, prefix_equal=equal)
        if "offline" in parts:
            peers = tuple(args.peer_python)
            figures = offline.run(
                offline.Args(peer_python=peers, repeats=args.repeats, prefix=False)
            )
            result["offline"] = {k: figures[k] for k in ("rates", "equal") if k in figures}
            result.update({k: v for k, v in figures.items() if k in KEYS})
    print(json.dumps(round_values(result)))
