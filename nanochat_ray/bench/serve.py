"""Measure serving: the engine in process, one plain server, Ray Serve and peers, in turns.

    nanochat-ray bench serve                                     # a fresh model of 14 M weights
    nanochat-ray bench serve --peer vllm=http://127.0.0.1:8001   # the same load, another server
    nanochat-ray bench serve --only http --systems ray --rate 4    # open loop, Poisson arrivals
    nanochat-ray bench serve --only http --systems local --concurrency 32 \\
        --storage DIR --run c6 --text README.md --sampling greedy sampled \\
        --precisions fp32 bf16 int8 --peer-python vllm=/envs/vllm/bin/python

The protocol is that of ``vllm bench serve`` (see ``bench.load``): random ids, or spans of a text,
of random lengths; the end of a turn is ignored. Systems take turns within each repeat; figures are
medians over the repeats. Ratios to a peer that this program starts compare equal precisions, and,
as "best", the precisions with the most tokens/s. A peer that runs already must serve the same
weights: ``nanochat-ray export`` writes them. --storage and --run name the run; if it does not
exist, it is made with random weights and served without draft tokens. The last line is one JSON
object, with null for what was not measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import signal
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_ray.bench import load, load_engine, offline
from nanochat_ray.bench.chart import lines_svg
from nanochat_ray.bench.environment import machine, text_tokens
from nanochat_ray.bench.long_prompt import long_prompt_delay
from nanochat_ray.bench.serve_figures import load_name, medians, ratios, table
from nanochat_ray.bench.systems import (
    STREAMS,
    SYSTEMS,
    System,
    goals,
    run_engine,
    systems,
)
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import check_float, check_int, check_name, check_port, require
from nanochat_ray.engine.config import EnginePrecision
from nanochat_ray.storage import Store

KEYS = ("prefix_speedup", "serve_first_token_ms", "serve_throughput_share")
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
    """NAME=URL of other servers of the same weights."""
    peer_python: list[str] = field(default_factory=list)
    """vllm=PATH of the Python that has vLLM: its server is started in each precision that it has,
    with the run exported. For the part "offline" see nanochat-ray bench offline."""
    key: str = ""
    """API key for all servers."""
    storage: str = ""
    """Where the run is; by default a temporary folder."""
    run: str = "bench"
    text: tuple[str, ...] = ()
    """Files, folders, globs or URIs whose text gives the prompts; by default random ids."""
    precisions: tuple[EnginePrecision, ...] = ("fp32",)
    """Each system that is started runs once in each of these that it has."""
    sampling: tuple[str, ...] = ("greedy",)
    """greedy, and sampled: temperature 0.8, top_p 0.95."""
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
    """Threads of each engine, the peers' included."""
    port: int = 8390
    """Of the servers that are started: this one and the next ones."""
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
        for name in self.sampling:
            require(name in load.SAMPLING, "sampling", name, " or ".join(load.SAMPLING))
        check_float("rate", self.rate)
        check_float("spread", self.spread, 0, 1)


def measure_http(
    args: Args, open_systems: list[System], text: list[int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Median figures by system and load ("32 sampled").

    The first round is not measured. It has as many requests as the others: an engine gets memory
    from the system as its slots are used for the first time, and requests would wait for that.
    """
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    loads = list(itertools.product(args.concurrency, args.sampling))
    for repeat in range(-1, args.repeats):
        for number, (streams, sampling) in enumerate(loads):
            prompts = load.random_prompts(
                max(8, args.requests * streams),
                vocab=VOCAB,
                prompt=args.prompt,
                output=args.output,
                spread=args.spread,
                # Prompts of its own: those of another load would be in the prefix caches.
                seed=1000 * repeat + number,
                sampling=sampling,
                text=text,
            )
            first = repeat % len(open_systems)
            for system in open_systems[first:] + open_systems[:first]:
                figures = system.run(args, prompts, streams)
                if repeat >= 0:
                    key = system.name, load_name(streams, sampling)
                    runs.setdefault(key, []).append(figures)
    names = [load_name(*of) for of in loads]
    return {
        system.name: {name: medians(runs[system.name, name]) for name in names}
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
                wait = long_prompt_delay(
                    system.url, system.model, vocab=VOCAB, key=args.key, seed=repeat
                )
                waits[system.name].append(asyncio.run(wait))
    return {name: statistics.median(of) for name, of in waits.items()}


def http_part(args: Args, open_systems: list[System], text: list[int]) -> dict[str, Any]:
    figures = measure_http(args, open_systems, text)
    print(table(figures), flush=True)
    if args.chart is not None:
        curves = {
            system: [
                (float(n), by_load[load_name(n, args.sampling[0])]["tokens_per_s"])
                for n in args.concurrency
            ]
            for system, by_load in figures.items()
        }
        args.chart.write_text(lines_svg("tokens/s by streams", curves))
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1))
    result: dict[str, Any] = {"systems": {system.name: system.about for system in open_systems}}
    result |= overhead_of_ray(args, figures)
    names = {(system.kind, system.precision): system.name for system in open_systems}
    for peer in dict.fromkeys(kind for kind, _ in names if kind not in SYSTEMS):
        result[f"ours_vs_{peer}"] = ratios(figures, names, peer)
        for load_of, by_precision in result[f"ours_vs_{peer}"].items():
            for label, values in by_precision.items():
                line = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
                print(f"{load_of}, {label}, ours / {peer}: {line}", flush=True)
    return result


def overhead_of_ray(args: Args, figures: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """What Ray Serve adds to the first token, and its share of the engine's throughput."""
    precision, sampling = args.precisions[0], args.sampling[0]
    ours, engine = figures.get(f"ray {precision}"), figures.get(f"engine {precision}")
    if ours is None or engine is None:
        return {}
    least, most = (load_name(of(args.concurrency), sampling) for of in (min, max))
    return {
        "serve_first_token_ms": ours[least]["ttft_p50_ms"] - engine[least]["ttft_p50_ms"],
        "serve_throughput_share": ours[most]["tokens_per_s"] / engine[most]["tokens_per_s"],
    }


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
        run = Store.at(args.storage).child("runs", args.run)
        load_engine.make_run(run)
        weights = "trained" if load_engine.is_trained(run) else "random"
        print(f"machine: {machine()}; run {args.run}, {weights} weights", flush=True)
        tokenizer = checkpoint.load_tokenizer(run)
        text = text_tokens(args.text, tokenizer) if args.text else []
        if {"http", "long"} & set(parts):
            with systems(args) as open_systems:
                result.update(http_part(args, open_systems, text) if "http" in parts else {})
                result["long_prompt_delay"] = (
                    measure_long(args, open_systems) if "long" in parts else None
                )
        if "prefix" in parts:
            alone = dataclasses.replace(
                args, systems="engine", peer=[], peer_python=[], precisions=args.precisions[:1]
            )
            with systems(alone) as open_systems:
                speedup, equal = measure_prefix(args, open_systems[0])
            print(f"shared prefix: {speedup:.2f} times the throughput, answers equal: {equal}")
            result.update(prefix_speedup=speedup, prefix_equal=equal)
        if "offline" in parts:
            peers = tuple(args.peer_python)
            result["offline"] = offline.run(
                offline.Args(
                    peer_python=peers,
                    repeats=args.repeats,
                    prefix=False,
                    precisions=args.precisions,
                )
            )
    print(json.dumps(round_values(result)))
