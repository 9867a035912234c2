"""More load than a server can take: what it admits, what it refuses, and how it recovers.

    nanochat-ray serve --run chat --no-ray --engine.max-queue-s 2
    nanochat-ray bench overload --url http://127.0.0.1:8000 --factor 10 --max-ttft-s 2.5
    nanochat-ray bench overload --attacks idle slow-head --connections 1000

First a closed loop measures the capacity in requests/s and single requests the usual time to the
first token, and a short flood makes the server take the memory that its configuration bounds: keys
and values of full batches, buffers, connections. Then requests arrive as a Poisson process at
``--factor`` times the capacity, whatever the answers are (an open loop), and probes measure the
time until a first token takes as long as usual again. Each attack of ``hostile_clients`` runs
beside one request after the other, and its recovery is measured too. The server must be on this
host: the memory of its processes is watched. Status 1 if something broke: an answer
without a status or with another than 200, 429 and 503, a refusal without Retry-After, a first token
after ``--max-ttft-s``, a recovery after ``--max-recovery-s``, or more growth than
``--max-growth-mib``.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil

from nanochat_ray.bench import hostile_clients, load
from nanochat_ray.bench.drill import PARTS, Cluster, listeners
from nanochat_ray.bench.http_stream import Result
from nanochat_ray.bench.open_loop import OpenLoop
from nanochat_ray.bench.overload_report import (
    AttackReport,
    Flood,
    attack_table,
    flood_table,
    seconds_text,
)
from nanochat_ray.checks import check_float, check_int, require
from nanochat_ray.serve.connections import raise_file_limit

VOCAB = 256
WARM_UP_S = 5.0
"""Of the flood before the measured one."""
PROBES = 5
NORMAL_FACTOR = 2.0
"""A first token is as fast as usual if it takes at most this many times as long as usual …"""
NORMAL_SLACK_S = 0.05
"""… or this much longer."""
REFUSALS = (429, 503)
SERVER_PARTS = ("engine", "ingress", "haproxy", "proxy")


@dataclass(frozen=True, kw_only=True)
class Args:
    url: str = "http://127.0.0.1:8000"
    """Endpoint on this host."""
    key: str = ""
    """API key."""
    session: str = ""
    """Name of the Ray session; by default the one of the endpoint."""
    factor: float = 10.0
    """Arrivals per second in the flood, in capacities; 0: no flood."""
    capacity: float = 0.0
    """Requests per second that the server can answer; 0: measured."""
    streams: int = 32
    """Answers at a time while the capacity is measured: as many as the server batches."""
    prompt: int = 64
    """Tokens of a prompt."""
    output: int = 64
    """Tokens of an answer."""
    seconds: float = 20.0
    """Of the flood, and of each attack."""
    attacks: tuple[str, ...] = ()
    """idle, slow-head, slow-body, slow-reader, large-body, gzip-bomb, abort."""
    connections: int = 100
    """Of an attack at a time."""
    max_ttft_s: float = 0.0
    """Bound on the 99th percentile of the time to the first token of admitted requests; 0: none."""
    max_recovery_s: float = 5.0
    """Bound on the time from the last arrival, or the end of an attack, to the usual time to the
    first token."""
    max_growth_mib: float = 64.0
    """Bound on the growth of the server's memory."""
    seed: int = 0
    """Of arrivals and prompts."""

    def __post_init__(self) -> None:
        require(bool(urlsplit(self.url).hostname), "url", self.url, "http://host:port")
        for name in self.attacks:
            require(
                name in hostile_clients.ATTACKS,
                "attacks",
                name,
                f"of {', '.join(hostile_clients.ATTACKS)}",
            )
        for name, least in (("streams", 1), ("prompt", 1), ("output", 2), ("connections", 1)):
            check_int(name, getattr(self, name), least)
        for name in ("factor", "capacity", "max_ttft_s", "max_growth_mib"):
            check_float(name, getattr(self, name))
        for name in ("seconds", "max_recovery_s"):
            check_float(name, getattr(self, name), above=True)


class Memory:
    """The resident memory of the server's processes: those that listen at the port, and those of
    its Ray session."""

    def __init__(self, processes: Sequence[psutil.Process]):
        self.processes = list(processes)
        self.peak_mib = 0.0

    @classmethod
    def of(cls, url: str, session: str = "") -> Memory:
        processes = {process.pid: process for process in listeners(url)}
        require(bool(processes), "url", url, "an endpoint on this host")
        if any("haproxy" in p.name() or p.name().startswith("ray::") for p in processes.values()):
            cluster = Cluster(session, url)
            for part in SERVER_PARTS:
                processes |= {p.pid: p for p in cluster.processes(part)}
        assert set(SERVER_PARTS) <= set(PARTS)
        return cls(list(processes.values()))

    def mib(self) -> float:
        """Now; a process that has ended counts as nothing."""
        total = 0
        for process in self.processes:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        self.peak_mib = max(self.peak_mib, total / 2**20)
        return total / 2**20

    async def watch(self) -> None:
        while True:
            self.mib()
            await asyncio.sleep(0.2)


class Endpoint:
    """Sends requests to one server."""

    def __init__(self, args: Args, model: str):
        self.args, self.model = args, model

    def prompts(self, count: int, seed: int) -> list[load.Prompt]:
        args = self.args
        return load.random_prompts(
            count, vocab=VOCAB, prompt=args.prompt, output=args.output, spread=0.5, seed=seed
        )

    async def complete(self, prompt: load.Prompt) -> Result:
        return await load.complete(self.args.url, self.model, prompt, self.args.key)

    async def probe(self) -> Result:
        return await self.complete(load.Prompt([1] * self.args.prompt, 2))

    async def usual_first_token_s(self) -> float:
        probes = [await self.probe() for _ in range(PROBES)]
        for result in probes:
            require(not result.error, "url", self.args.url, f"that answers: {result.error}")
        return load.percentile([result.first_s for result in probes], 0.5)

    async def capacity(self) -> float:
        """Requests/s of a closed loop."""
        prompts = self.prompts(3 * self.args.streams, self.args.seed + 1)
        results, seconds = await load.drive(
            self.args.url, self.model, prompts, concurrency=self.args.streams, key=self.args.key
        )
        for result in results:
            require(not result.error, "streams", self.args.streams, f"fewer: {result.error}")
        return len(results) / seconds


async def flood(endpoint: Endpoint, memory: Memory) -> Flood:
    """Measures the capacity unless it is given, floods the server, and waits for its recovery."""
    args, report = endpoint.args, Flood()
    await endpoint.probe()  # the first one warms up
    report.rss_idle_mib = memory.mib()
    report.capacity_per_s = args.capacity or await endpoint.capacity()
    report.usual_first_token_s = await endpoint.usual_first_token_s()
    rate = args.factor * report.capacity_per_s
    for seconds in (WARM_UP_S, args.seconds):
        report.rss_before_mib = memory.peak_mib = memory.mib()
        dues = _arrivals(rate, seconds, args.seed)
        prompts = endpoint.prompts(len(dues), args.seed + 2)
        requests = [
            load.completion_request(args.url, endpoint.model, prompt, args.key)
            for prompt in prompts
        ]
        sender = OpenLoop(args.url, requests, dues)
        began = time.perf_counter()
        sending = asyncio.ensure_future(asyncio.to_thread(sender.run))
        await asyncio.to_thread(sender.all_sent.wait)
        last_arrival = time.perf_counter()
        report.offered_per_s = len(requests) / (last_arrival - began)
        report.recovery_s = await _recovery_s(endpoint, last_arrival, report.usual_first_token_s)
        exchanges = await sending
    _count(report, [exchange.result() for exchange in exchanges])
    report.send_delay_p99_s = load.percentile(sender.send_delays_s, 0.99)
    report.rss_peak_mib, report.rss_after_mib = memory.peak_mib, memory.mib()
    return report


def _arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process, with the first one behind ``seconds``."""
    rng = random.Random(seed)
    times = [rng.expovariate(rate)]
    while times[-1] < seconds:
        times.append(times[-1] + rng.expovariate(rate))
    return times


async def _recovery_s(endpoint: Endpoint, since: float, usual_s: float) -> float | None:
    bound = max(NORMAL_FACTOR * usual_s, usual_s + NORMAL_SLACK_S)
    while time.perf_counter() < since + 4 * endpoint.args.max_recovery_s + 30:
        start = time.perf_counter()
        result = await endpoint.probe()
        if not result.error and result.first_s <= bound:
            return start - since
        await asyncio.sleep(0.05)
    return None


def _count(report: Flood, results: Sequence[Result]) -> None:
    report.num_offered = len(results)
    good = [r for r in results if not r.error]
    refusals = [r for r in results if r.status in REFUSALS]
    report.num_admitted, report.num_refused = len(good), len(refusals)
    report.without_retry_after = sum(r.retry_after_s is None for r in refusals)
    report.failures = Counter(r.error[:80] for r in results if r.error and r.status not in REFUSALS)
    first = [r.first_s for r in good]
    report.first_token_p50_s, report.first_token_p99_s = (
        load.percentile(first, share) for share in (0.5, 0.99)
    )
    waits = [r.total_s for r in refusals]
    report.refusal_p50_s, report.refusal_p99_s = (
        load.percentile(waits, share) for share in (0.5, 0.99)
    )
    if good:
        seconds = max(r.began + r.total_s for r in good) - min(r.began for r in results)
        report.tokens_per_s = sum(r.tokens for r in good) / seconds


async def run_attack(endpoint: Endpoint, memory: Memory, name: str) -> AttackReport:
    """One attack, and one request after the other beside it; then the recovery."""
    args = endpoint.args
    usual_s = await endpoint.usual_first_token_s()
    target = hostile_clients.Target(
        url=args.url,
        key=args.key,
        model=endpoint.model,
        connections=args.connections,
        seconds=args.seconds,
        seed=args.seed,
    )
    before = memory.peak_mib = memory.mib()
    attacking = asyncio.ensure_future(hostile_clients.attack(target, name))
    results = []
    while not attacking.done():
        results.append(await endpoint.probe())
        await asyncio.sleep(0.1)
    outcomes = await attacking
    recovery_s = await _recovery_s(endpoint, time.perf_counter(), usual_s)
    first = [r.first_s for r in results if not r.error]
    refused_answers = sum(r.status in REFUSALS and r.retry_after_s is not None for r in results)
    return AttackReport(
        name,
        outcomes,
        answers=len(first),
        refused_answers=refused_answers,
        failed_answers=len(results) - len(first) - refused_answers,
        first_token_p50_s=load.percentile(first, 0.5),
        first_token_p99_s=load.percentile(first, 0.99),
        recovery_s=recovery_s,
        rss_before_mib=before,
        rss_peak_mib=memory.peak_mib,
        rss_after_mib=memory.mib(),
    )


async def overload(args: Args) -> tuple[Flood | None, list[AttackReport]]:
    endpoint = Endpoint(args, await asyncio.to_thread(load.model_at, args.url, args.key))
    memory = Memory.of(args.url, args.session)
    watching = asyncio.ensure_future(memory.watch())
    try:
        result = await flood(endpoint, memory) if args.factor else None
        attacks = [await run_attack(endpoint, memory, name) for name in args.attacks]
    finally:
        watching.cancel()
    return result, attacks


def failures(args: Args, report: Flood | None, attacks: Sequence[AttackReport]) -> list[str]:
    """What should not have happened."""
    texts = []
    if report is not None:
        texts += [f"{count} requests: {reason}" for reason, count in report.failures.items()]
        if report.without_retry_after:
            texts.append(f"{report.without_retry_after} refusals had no Retry-After")
        if args.max_ttft_s and report.first_token_p99_s > args.max_ttft_s:
            texts.append(f"first token p99: {report.first_token_p99_s:.2f} s")
        if report.recovery_s is None or report.recovery_s > args.max_recovery_s:
            texts.append(f"recovery: {seconds_text(report.recovery_s)} s")
        texts += _growth(args, "flood", report)
    for attack in attacks:
        if attack.failed_answers or not attack.answers + attack.refused_answers:
            texts.append(
                f"{attack.name}: {attack.failed_answers} requests beside it failed, "
                f"{attack.answers} were answered"
            )
        if attack.recovery_s is None or attack.recovery_s > args.max_recovery_s:
            texts.append(f"{attack.name}: recovery: {seconds_text(attack.recovery_s)} s")
        texts += _growth(args, attack.name, attack)
    return texts


def _growth(args: Args, name: str, report: Flood | AttackReport) -> list[str]:
    growth = report.rss_after_mib - report.rss_before_mib
    return [f"{name}: memory grew by {growth:.0f} MiB"] * (growth > args.max_growth_mib)


def main(args: Args) -> int:
    raise_file_limit()  # each request of a flood has a connection of its own
    report, attacks = asyncio.run(overload(args))
    if report is not None:
        print(flood_table(report))
    if attacks:
        print(attack_table(attacks))
    problems = failures(args, report, attacks)
    for problem in problems:
        print(problem)
    figures: dict[str, Any] = {
        # Not asdict, which makes other keys of a Counter.
        "flood": report and vars(report),
        "attacks": [vars(attack) for attack in attacks],
        "failures": problems,
    }
    print(json.dumps(figures))
    return 1 if problems else 0
