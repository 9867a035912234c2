"""Kill or stop parts of a Ray cluster on this host while it streams, and report what clients saw.

    nanochat-ray drill --url http://127.0.0.1:8000                      # every part, one round each
    nanochat-ray drill --parts engine --rounds 30 --streams 32
    nanochat-ray drill --parts engine --signal stop --stop-s 30         # a hung process

Parts are engine, ingress, haproxy, proxy, controller, dashboard, agent, gcs and raylet. The last
three are left out by default: a node ends with its agent and its raylet (``serve --restarts``
starts another), and a cluster with its gcs, unless that is started again, as ``serve`` does. The
drill sends signals to processes of the cluster: use it on one that may be disturbed. Every answer
is greedy, and its text is compared with that of an undisturbed one. Status 1 if a stream breaks or
changes that should not have (those of an ingress, of HAProxy, its manager (proxy) and a node may
break), if the endpoint answers no more, or if a part is not replaced that Serve replaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil

from nanochat_ray.bench import chart, load
from nanochat_ray.bench.http_stream import Result
from nanochat_ray.checks import check_float, check_int, require

PARTS: Mapping[str, str] = {
    "engine": r"ray::ServeReplica:[^:]+:engine",
    "ingress": r"ray::ServeReplica:[^:]+:ingress",
    "haproxy": r"(\S*/)?haproxy ",
    "proxy": r"ray::(HAProxyManager|ProxyActor)",
    "controller": r"ray::ServeController",
    "agent": r".*dashboard/agent\.py",
    "dashboard": r".*dashboard/dashboard\.py",
    "gcs": r"\S*gcs_server ",
    "raylet": r"\S*/raylet ",
}
"""Part → what the command line of its processes begins with."""
DEFAULT_PARTS = ("engine", "ingress", "haproxy", "proxy", "controller", "dashboard")
MAY_BREAK = {"ingress", "haproxy", "proxy", "agent", "gcs", "raylet"}
"""Streams run through these, or on a node that ends with them, so theirs end with them."""
NODE_PARTS = {"agent", "gcs", "raylet"}
"""A node ends with these. ``serve --restarts`` starts another, KubeRay another pod."""
NOT_REPLACED = {"dashboard", *NODE_PARTS}
"""Nothing in a cluster starts these again."""
STEADY_S = 2.0
"""Without a broken stream before a signal is sent."""
VOCAB = 256


@dataclass(frozen=True, kw_only=True)
class Args:
    url: str = "http://127.0.0.1:8000"
    """Endpoint, whose cluster is on this host."""
    key: str = ""
    """API key."""
    parts: tuple[str, ...] = DEFAULT_PARTS
    """What to disturb, of the parts above."""
    rounds: int = 1
    """Signals to each part. Each goes to a random process of it at a random moment."""
    signal: str = "kill"
    """Kill, or stop: SIGSTOP, and SIGCONT later."""
    stop_s: float = 20.0
    """Seconds from SIGSTOP to SIGCONT."""
    streams: int = 8
    """Answers at a time."""
    tokens: int = 200
    """Of each answer."""
    recover_s: float = 120.0
    """Seconds until the endpoint must answer. Also until the part must be replaced."""
    watch_s: float = 5.0
    """Seconds that a round lasts at least. Without its gcs a cluster ends after 60 s."""
    session: str = ""
    """Name of the Ray session; by default the one of the endpoint."""
    seed: int = 0
    """Of moments, processes and prompts."""

    def __post_init__(self) -> None:
        for name in self.parts:
            require(name in PARTS, "parts", name, f"of {', '.join(PARTS)}")
        require(self.signal in ("kill", "stop"), "signal", self.signal, "kill or stop")
        for name, least in (("rounds", 1), ("streams", 1), ("tokens", 2), ("seed", 0)):
            check_int(name, getattr(self, name), least)
        for name in ("stop_s", "recover_s"):
            check_float(name, getattr(self, name), above=True)
        check_float("watch_s", self.watch_s)


@dataclass
class Round:
    """What one signal did."""

    part: str
    process_id: int
    broken_streams: int = 0
    """Streams that ended with an error after their first token."""
    changed_answers: int = 0
    """Answers with another text than the undisturbed one."""
    refused_requests: int = 0
    """Requests that got no first token."""
    answers: int = 0
    longest_gap_s: float = 0.0
    """Between two tokens of a stream."""
    recovery_s: float | None = None
    """Until the first complete answer after the last error; None: not within the time."""
    replacement_s: float | None = None
    """Until the part has as many processes as before; None: not within the time."""

    @property
    def is_over(self) -> bool:
        has_part = self.replacement_s is not None or self.part in NOT_REPLACED
        return has_part and self.recovery_s is not None


class Cluster:
    """The processes of one Ray session on this host: that of the endpoint at ``url``, if there are
    several and no ``session`` is named."""

    def __init__(self, session: str = "", url: str = ""):
        self._url = url
        sessions = set(_sessions())
        if session or len(sessions) > 1:
            sessions &= {session or session_at(url)}
        require(len(sessions) == 1, "session", session, f"one of {', '.join(sorted(_sessions()))}")
        (self.session,) = sessions

    def look_for_successor(self) -> None:
        """The session that serves now, such as after a restart by ``serve --restarts``."""
        self.session = session_at(self._url) or self.session

    def processes(self, part: str) -> list[psutil.Process]:
        return self.matching(PARTS[part])

    def matching(self, title: str) -> list[psutil.Process]:
        """The processes whose command line begins with the regular expression."""
        return [p for p in psutil.process_iter() if matches(p, title) and self._owns(p)]

    def _owns(self, process: psutil.Process) -> bool:
        """Ray's own programs name the session, and its workers are their children."""
        try:
            return any(self.session in _command(p) for p in (process, *process.parents()))
        except psutil.Error:
            return False


def matches(process: psutil.Process, title: str) -> bool:
    """Whether the process's command line begins with the regular expression."""
    return re.match(title, _command(process)) is not None


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) + " "
    except psutil.Error:
        return ""


def _session_in(command: str) -> str:
    match = re.search(r"session_[\w-]+", command)
    return match[0] if match else ""


def _sessions() -> Iterator[str]:
    for process in psutil.process_iter():
        command = _command(process)
        if re.match(PARTS["gcs"], command) and (session := _session_in(command)):
            yield session


def listeners(url: str) -> list[psutil.Process]:
    """The processes that listen at the port of ``url``."""
    port = urlsplit(url).port or 80
    process_ids = {
        c.pid
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid
    }
    return [psutil.Process(process_id) for process_id in process_ids]


def session_at(url: str) -> str:
    """The Ray session that listens at the port of ``url``; "" if there is none on this host."""
    with contextlib.suppress(psutil.Error):
        for listener in listeners(url) if url else ():
            for process in (listener, *listener.parents()):
                if session := _session_in(_command(process)):
                    return session
    return ""


@dataclass
class Streams:
    """Answers without a pause, and what happened to them since ``begin``."""

    args: Args
    model: str
    prompts: Sequence[load.Prompt]
    texts: Sequence[str]
    """What undisturbed answers are."""
    round: Round | None = None
    last_break: float = 0.0
    last_answer: float = 0.0
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._stream(i)) for i in range(self.args.streams)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _stream(self, number: int) -> None:
        index = number
        while True:
            index = (index + 1) % len(self.prompts)
            prompt = self.prompts[index]
            result = await load.complete(self.args.url, self.model, prompt, self.args.key)
            self._count(result, self.texts[index])
            if result.error:
                await asyncio.sleep(0.2)

    def _count(self, result: Result, text: str) -> None:
        now = time.perf_counter()
        if result.error:
            self.last_break = now
        else:
            self.last_answer = now
        if (counts := self.round) is None:
            return
        counts.longest_gap_s = max([counts.longest_gap_s, *result.gaps_s])
        if result.error:
            counts.broken_streams += bool(result.first_s)
            counts.refused_requests += not result.first_s
        else:
            counts.answers += 1
            counts.changed_answers += result.text != text

    async def steady(self) -> None:
        """Returns when no stream has broken for a while."""
        began = time.perf_counter()
        while time.perf_counter() < max(began, self.last_break) + STEADY_S:
            await asyncio.sleep(0.05)


async def disturb(args: Args, cluster: Cluster, streams: Streams, part: str, rng: Any) -> Round:
    await streams.steady()
    await asyncio.sleep(rng.uniform(0.0, 1.0))
    processes = cluster.processes(part)
    require(bool(processes), "parts", part, f"session {cluster.session} has no such process here")
    victim = rng.choice(processes)
    counts = streams.round = Round(part, victim.pid)
    began = time.perf_counter()
    sending = asyncio.create_task(_send_signal(args, victim))
    await asyncio.sleep(0)  # it is sent
    while (now := time.perf_counter()) < began + args.watch_s + args.recover_s:
        if counts.is_over and now > max(began + args.watch_s, streams.last_break + STEADY_S):
            break
        if streams.last_answer <= max(began, streams.last_break):
            counts.recovery_s = None
        elif counts.recovery_s is None:
            counts.recovery_s = streams.last_answer - began
        # One that is killed may be listed still; one that is stopped counts when it runs again.
        has_victim = args.signal == "stop" and sending.done()
        if part in NODE_PARTS:
            cluster.look_for_successor()
        others = [p for p in cluster.processes(part) if has_victim or p != victim]
        if counts.replacement_s is None and len(others) >= len(processes):
            counts.replacement_s = now - began
        await asyncio.sleep(0.2)
    await sending
    streams.round = None
    return counts


async def _send_signal(args: Args, victim: psutil.Process) -> None:
    """Returns when the signal is sent, or when a stopped process continues."""
    if args.signal == "kill":
        victim.kill()
        return
    victim.send_signal(signal.SIGSTOP)
    await asyncio.sleep(args.stop_s)
    with contextlib.suppress(psutil.NoSuchProcess):  # Serve has replaced it
        victim.send_signal(signal.SIGCONT)


async def drill(args: Args) -> list[Round]:
    """Rounds in the order in which they happened; they end when the endpoint is dead."""
    cluster = Cluster(args.session, args.url)
    model = await asyncio.to_thread(load.model_at, args.url, args.key, args.recover_s)
    prompts = load.random_prompts(
        args.streams, vocab=VOCAB, prompt=24, output=args.tokens, seed=args.seed
    )
    parts = args.parts
    if parts == DEFAULT_PARTS:  # a cluster may have no dashboard, or no HAProxy
        parts = tuple(part for part in parts if cluster.processes(part))
    texts = []
    for prompt in prompts:
        result = await load.complete(args.url, model, prompt, args.key)
        require(not result.error, "url", args.url, f"an endpoint that answers: {result.error}")
        texts.append(result.text)
    streams, rng = Streams(args, model, prompts, texts), random.Random(args.seed)
    streams.start()
    rounds = []
    try:
        for number in range(args.rounds):
            for part in parts:
                if number and part in NOT_REPLACED and not cluster.processes(part):
                    continue  # the round before has ended it
                rounds.append(await disturb(args, cluster, streams, part, rng))
                cells = " | ".join(_row(part, rounds[-1:]))
                print(f"round {number + 1}: {cells}", file=sys.stderr, flush=True)
                if rounds[-1].recovery_s is None:
                    return rounds  # a dead endpoint shows nothing else
    finally:
        await streams.stop()
    return rounds


def _row(part: str, rounds: Sequence[Round]) -> list[str]:
    gaps = sorted(r.longest_gap_s for r in rounds)
    names = ("answers", "broken_streams", "changed_answers", "refused_requests")
    sums = (sum(getattr(r, name) for r in rounds) for name in names)
    cells = [part, str(len(rounds)), *map(str, sums)]
    cells += [f"{gaps[len(gaps) // 2]:.2f}", f"{gaps[-1]:.2f}"]
    cells += [seconds_of([r.recovery_s for r in rounds], max)]
    cells += [seconds_of([r.replacement_s for r in rounds], max)]
    return cells


def seconds_of(times: Sequence[float | None], figure: Callable[[list[float]], float]) -> str:
    """A figure of the times, such as their maximum; "never" if one of them is None."""
    seconds = [time for time in times if time is not None]
    return f"{figure(seconds):.1f}" if len(seconds) == len(times) else "never"


def table(rounds: Sequence[Round]) -> str:
    head = ["part", "signals", "answers", "broken", "changed", "refused"]
    head += ["median gap (s)", "longest gap (s)", "slowest recovery (s)"]
    head += ["slowest replacement (s)"]
    parts = dict.fromkeys(r.part for r in rounds)
    return chart.markdown(head, *(_row(p, [r for r in rounds if r.part == p]) for p in parts))


def failures(rounds: Sequence[Round]) -> list[str]:
    """What should not have happened."""
    texts = []
    for r in rounds:
        if r.changed_answers:
            texts.append(f"{r.part}: {r.changed_answers} answers changed")
        if r.broken_streams and r.part not in MAY_BREAK:
            texts.append(f"{r.part}: {r.broken_streams} streams broke")
        if r.recovery_s is None:
            texts.append(f"{r.part}: the endpoint did not answer again in time")
        if r.replacement_s is None and r.part not in NOT_REPLACED:
            texts.append(f"{r.part}: it was not replaced in time")
    return texts


def main(args: Args) -> int:
    rounds = asyncio.run(drill(args))
    print(table(rounds))
    problems = failures(rounds)
    for problem in problems:
        print(problem)
    print(json.dumps({"rounds": [dataclasses.asdict(r) for r in rounds], "failures": problems}))
    return 1 if problems else 0
