"""Measure serving: the engine in process, one plain server, Ray Serve and peers, in turns.

    nanochat-ray bench serve                                     # a fresh model of 14 M weights
    nanochat-ray bench serve --peer vllm=http://127.0.0.1:8001   # the same load, another server
    nanochat-ray bench serve --only http --systems ray --rate 4    # open loop, Poisson arrivals
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
import signal
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_ray.bench import load, load_engine, offline
from nanochat_ray.bench.chart import lines_svg
from nanochat_ray.bench.systems import STREAMS, System, goals, run_engine, systems
from nanochat_ray.checks import check_float, check_int, check_name, check_port
from nanochat_ray.storage import Store

KEYS = (
    *("decode_vs_vllm", "decode_vs_transformers", "http_vs_vllm", "prefix_speedup"),
    *("serve_first_token_ms", "serve_throughput_share"),
)
VOCAB = 2000
"""Ids below it are in every model's vocabulary and are no special ones."""


@dataclass(frozen=True, kw_only=True)
class Args:
    only: str = "http,prefix"
    """Parts, separated by commas: http, long, prefix, offline."""
    systems: str = "engine,local,ray"
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
    """Where to write all figures by system and streams, as JSON."""
    child: str = ""
    """Internal: the system that this process is."""

    def __post_init__(self) -> None:
        check_name("run", self.run)
        check_port("port", self.port)
        for name in ("requests", "repeats", "threads", "prompt", "output", "own", "shared_output"):
            check_int(name, getattr(self, name), 1)
        check_int("shared_prefix", self.shared_prefix, 0)
        for streams in self.concurrency:
            check_int("concurrency", streams, 1)
        check_float("rate", self.rate)
        check_float("spread", self.spread, 0, 1)


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [k for k, v in runs[0].items() if isinstance(v, (int, float))]
    return {name: statistics.median(run[name] for run in runs) for name in numbers}


def measure_http(args: Args, open_systems: list[System]) -> dict[str, dict[int, dict[str, Any]]]:
    """Median figures by system and streams."""
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
            first = repeat % len(open_systems)
            for system in open_systems[first:] + open_systems[:first]:
                figures = system.run(args, prompts, streams)
                if repeat >= 0:
                    runs.setdefault((system.name, streams), []).append(figures)
    return {
        system.name: {streams: medians(runs[system.name, streams]) for streams in args.concurrency}
        for system in open_systems
    }


def measure_prefix(args: Args, engine: System) -> tuple[float, bool]:
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


def measure_long(args: Args, open_systems: list[System]) -> dict[str, float]:
    """By server: what a prompt of 1,900 tokens makes 16 answers wait, in median steps."""
    waits: dict[str, list[float]] = {system.name: [] for system in open_systems if system.url}
    for repeat in range(args.repeats):
        for system in open_systems:
            if system.url:
                wait = load.long_prompt_delay(
                    system.url, system.model, vocab=VOCAB, key=args.key, seed=repeat
                )
                waits[system.name].append(asyncio.run(wait))
    return {name: statistics.median(of) for name, of in waits.items()}


def table(figures: dict[str, dict[int, dict[str, Any]]]) -> str:
    columns = ("requests_per_s", "tokens_per_s", "all_tokens_per_s")
    times = [f"{name}_p{share}_ms" for name in ("ttft", "tpot", "itl", "e2e") for share in (50, 99)]
    extra = ("ttft_p90_ms", "itl_p90_ms", "goodput_per_s", "failed")
    lines = []
    for system, by_streams in figures.items():
        for streams, metrics in by_streams.items():
            cells = [f"{metrics[c]:9.1f}" for c in (*columns, *times, *extra) if c in metrics]
            lines.append(f"{system:>10} {streams:>7} " + " ".join(cells))
    some = next(iter(next(iter(figures.values())).values()))
    names = [c for c in (*columns, *times, *extra) if c in some]
    short = [
        c.removesuffix("_ms").replace("tokens_per_s", "tok/s").replace("_per_s", "/s")
        for c in names
    ]
    head = f"{'':>10} {'streams':>7} " + " ".join(f"{name:>9}" for name in short)
    return "\n".join([head, *lines])


def http_part(args: Args, open_systems: list[System]) -> dict[str, Any]:
    figures = measure_http(args, open_systems)
    print(table(figures), flush=True)
    if args.chart is not None:
        curves = {
            system: [(float(n), f["tokens_per_s"]) for n, f in by_streams.items()]
            for system, by_streams in figures.items()
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the systems are ended too
    if args.child:
        run_engine(args)
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
            with systems(args) as open_systems:
                result.update(http_part(args, open_systems) if "http" in parts else {})
                result["long_prompt_delay"] = (
                    measure_long(args, open_systems) if "long" in parts else None
                )
        if "prefix" in parts:
            with systems(dataclasses.replace(args, systems="engine", peer=[])) as open_systems:
                speedup, equal = measure_prefix(args, open_systems[0])
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
