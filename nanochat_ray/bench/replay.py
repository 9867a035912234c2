"""Thousands of broken requests at a server that streams to others: none may hurt another.

    nanochat-ray bench replay --url http://127.0.0.1:8000 --pid PID

Status 1 if a request gets a 5xx other than 503 or an answer that is no answer, if a steady stream
ends or waits longer than ``--max-gap-s``, or if the process of ``--pid`` grows. The requests are
the same for the same ``--seed``.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psutil

from nanochat_ray.bench.mutations import Mutation, mutations
from nanochat_ray.checks import check_float, check_int

BODY_SHOWN = 300
"""Bytes of a request that failed."""


@dataclass(frozen=True, kw_only=True)
class Args:
    url: str = "http://127.0.0.1:8000"
    key: str = ""
    """API key."""
    count: int = 5000
    seed: int = 0
    clients: int = 12
    """Broken requests at a time."""
    streams: int = 2
    """Steady streams beside them."""
    stream_tokens: int = 200
    """Tokens of each stream before the next begins."""
    huge_bytes: int = 1_300_000
    """Size of one in 50 requests; 0 for none."""
    max_gap_s: float = 0.5
    pid: int = 0
    """The server's process, whose memory is watched; 0 for none."""
    max_growth_mib: int = 64
    """From the middle of the replay to its end."""

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("clients", 1), ("streams", 0), ("stream_tokens", 2)):
            check_int(name, getattr(self, name), least)
        check_int("huge_bytes", self.huge_bytes, 0)
        check_float("max_gap_s", self.max_gap_s)
        if not urlsplit(self.url).hostname:
            raise ValueError(f"url={self.url!r} is not allowed: http://host:port")


@dataclass
class Report:
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between chunks of the steady streams."""
    streams: int = 0
    """Steady streams that came to their end."""
    growth_mib: float = 0.0


def _connection(args: Args, timeout: float) -> http.client.HTTPConnection:
    parts = urlsplit(args.url)
    return http.client.HTTPConnection(str(parts.hostname), parts.port or 80, timeout=timeout)


def _headers(args: Args) -> dict[str, str]:
    return {"authorization": f"Bearer {args.key}"} if args.key else {}


def send(args: Args, mutation: Mutation, report: Report) -> None:
    headers = _headers(args) | mutation.headers
    connection = _connection(args, mutation.leaves_after_s or 60.0)
    try:
        connection.request(mutation.method, mutation.path, mutation.body, headers)
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException) as error:
        # A refusal may come before the whole body was sent.
        if mutation.leaves_after_s is None and not isinstance(error, ConnectionError):
            report.failures.append(f"{_describe(mutation)}: {type(error).__name__} {error}")
        return
    finally:
        connection.close()
    report.statuses[response.status] += 1
    if (wrong := _wrong(mutation, response, text)) is not None:
        report.failures.append(f"{_describe(mutation)}: {response.status} {wrong[:BODY_SHOWN]!r}")


def _wrong(mutation: Mutation, response: http.client.HTTPResponse, text: bytes) -> bytes | None:
    """What is wrong with an answer."""
    if response.status >= 500 and response.status != 503:
        return text
    if response.status >= 400 and mutation.method != "HEAD":
        try:
            return None if json.loads(text)["error"]["message"] and len(text) < 5000 else text
        except (ValueError, KeyError, TypeError):
            return text
    if "event-stream" in (response.getheader("content-type") or ""):
        endings = (b"data: [DONE]\n\n", b"response.completed", b"response.incomplete")
        return None if any(end in text for end in endings) else text[-BODY_SHOWN:]
    return None


def _describe(mutation: Mutation) -> str:
    return f"{mutation.method} {mutation.path} {mutation.body[:BODY_SHOWN]!r}"


def stream(args: Args, report: Report, stop: threading.Event) -> None:
    """Steady streams, one after another."""
    body = {"prompt": "steady", "max_tokens": args.stream_tokens, "ignore_eos": True}
    raw = json.dumps({**body, "stream": True, "temperature": 0.5}).encode()
    while not stop.is_set():
        connection = _connection(args, 60.0)
        try:
            headers = {"content-type": "application/json", **_headers(args)}
            connection.request("POST", "/v1/completions", raw, headers)
            response = connection.getresponse()
            if response.status in (429, 503):
                time.sleep(0.1)
                continue
            last, text = time.monotonic(), b""
            while line := response.readline():
                now = time.monotonic()
                report.gaps_s.append(now - last)
                last, text = now, line if line.strip() else text
            if text.strip() != b"data: [DONE]":
                report.failures.append(f"a steady stream ended with {response.status} {text!r}")
            report.streams += 1
        except (OSError, http.client.HTTPException) as error:
            report.failures.append(f"a steady stream: {type(error).__name__} {error}")
        finally:
            connection.close()


def replay(args: Args) -> Report:
    report, stop = Report(), threading.Event()
    steady = [
        threading.Thread(target=stream, args=(args, report, stop)) for _ in range(args.streams)
    ]
    for thread in steady:
        thread.start()

    def send_all(part: Iterable[Mutation]) -> float:
        with ThreadPoolExecutor(args.clients) as pool:
            for _ in pool.map(lambda mutation: send(args, mutation, report), part):
                pass
        return psutil.Process(args.pid).memory_info().rss / 2**20 if args.pid else 0.0

    try:
        half = args.count // 2
        every = list(mutations(args.count, args.seed, huge_bytes=args.huge_bytes))
        middle = send_all(every[:half])
        report.growth_mib = send_all(every[half:]) - middle
    finally:
        stop.set()
        for thread in steady:
            thread.join()
    gap = max(report.gaps_s, default=0.0)
    if gap > args.max_gap_s:
        report.failures.append(f"a steady stream waited {gap:.2f} s")
    if report.growth_mib > args.max_growth_mib:
        report.failures.append(f"the process grew by {report.growth_mib:.0f} MiB")
    return report


def main(args: Args) -> int:
    report = replay(args)
    for failure in report.failures[:50]:
        print(failure)
    print(
        json.dumps(
            {
                "requests": args.count,
                "statuses": dict(sorted(report.statuses.items())),
                "failures": len(report.failures),
                "steady_streams": report.streams,
                "longest_gap_s": round(max(report.gaps_s, default=0.0), 3),
                "growth_mib": round(report.growth_mib, 1),
                "args": dataclasses.asdict(args) | {"key": bool(args.key)},
            }
        )
    )
    return 1 if report.failures else 0
