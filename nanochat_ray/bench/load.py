"""Load for any OpenAI endpoint, measured as ``vllm bench serve`` does.

TTFT is the time to the first chunk with a choice, ITL the time between such chunks, TPOT the time
after the first token over the tokens after it, E2E the whole; all in seconds.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nanochat_ray.bench.http_stream import Connection, Response, Result

SAMPLING = {"greedy": (0.0, 1.0), "sampled": (0.8, 0.95)}
"""Temperature and top_p."""


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    output: int
    """Tokens of the answer; the end of a turn is ignored."""
    temperature: float = 0.0
    top_p: float = 1.0


def random_prompts(
    count: int,
    *,
    vocab: int,
    prompt: int,
    output: int,
    spread: float = 0.0,
    seed: int = 0,
    sampling: str = "greedy",
    text: Sequence[int] = (),
) -> list[Prompt]:
    """Prompts of random ids below ``vocab``, or random spans of ``text`` if that is given.

    Lengths are uniform within ``spread`` (a share) around ``prompt`` and ``output``. ValueError if
    the text is shorter than the longest prompt.
    """
    rng = random.Random(seed)
    longest = round(prompt * (1 + spread))
    if 0 < len(text) <= longest:
        raise ValueError(f"text has {len(text)} tokens: more than prompt={longest} are needed")

    def length(middle: int) -> int:
        return max(1, rng.randint(round(middle * (1 - spread)), round(middle * (1 + spread))))

    def ids() -> list[int]:
        count = length(prompt)
        if not text:
            return [rng.randrange(vocab) for _ in range(count)]
        start = rng.randrange(len(text) - count)
        return list(text[start : start + count])

    return [Prompt(ids(), length(output), *SAMPLING[sampling]) for _ in range(count)]


def shared_prefix_prompts(
    count: int, *, vocab: int, shared_prefix: int, own: int, output: int, seed: int = 0
) -> list[Prompt]:
    """Prompts that all begin with the same ``shared_prefix`` ids."""
    rng = random.Random(seed)
    prefix = [rng.randrange(vocab) for _ in range(shared_prefix)]
    return [
        Prompt(prefix + [rng.randrange(vocab) for _ in range(own)], output) for _ in range(count)
    ]


def fetch(url: str, key: str) -> str:
    """The body of a GET; OSError if there is no answer."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=5) as response:
        return str(response.read().decode())


def model_at(url: str, key: str, seconds: float = 600.0, process: Any = None) -> str:
    """The name of the model at ``url``, once it answers. ValueError if it does not in time, or if
    the process that shall serve it ends."""
    until = time.monotonic() + seconds
    while True:
        try:
            return str(json.loads(fetch(f"{url}/v1/models", key))["data"][0]["id"])
        except (OSError, ValueError) as error:
            is_over = process is not None and process.poll() is not None
            if is_over or time.monotonic() > until:
                raise ValueError(f"{url} does not answer: {error}") from None
            time.sleep(0.3)


def completion_request(
    url: str, model: str, prompt: Prompt, key: str = "", *, keep_alive: bool = False
) -> bytes:
    """For a streamed completion at ``url`` (without /v1)."""
    parts = urlsplit(url)
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt.ids,
            "max_tokens": prompt.output,
            "temperature": prompt.temperature,
            "top_p": prompt.top_p,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        + (f"Authorization: Bearer {key}\r\n" if key else "")
        + ("" if keep_alive else "Connection: close\r\n")
        + "\r\n"
    )
    return head.encode() + body


async def complete(
    url: str,
    model: str,
    prompt: Prompt,
    key: str = "",
    idle_connections: list[Connection] | None = None,
) -> Result:
    """One streamed completion at ``url`` (without /v1), on a connection of its own or, with a list
    of idle ones, on one of these; it is one of them afterwards."""
    keep_alive = idle_connections is not None
    request = completion_request(url, model, prompt, key, keep_alive=keep_alive)
    result = Result(time.perf_counter())
    while idle_connections:
        connection = idle_connections.pop()
        if connection.is_open:
            await connection.exchange(request, Response(result))
            if result.status:
                break
            result = Result(result.began)  # the server had closed it
    else:
        try:
            connection = await Connection.open(url)
        except OSError as error:
            result.error = str(error)
            return result
        try:
            await connection.exchange(request, Response(result))
        finally:
            if not keep_alive:
                connection.transport.close()
    if idle_connections is not None and connection.is_open:
        idle_connections.append(connection)
    return result


async def drive(
    url: str,
    model: str,
    prompts: Sequence[Prompt],
    *,
    concurrency: int,
    rate: float = 0.0,
    key: str = "",
    seed: int = 0,
) -> tuple[list[Result], float]:
    """Results in the order of ``prompts``, and the seconds that all took.

    Closed loop: ``concurrency`` streams at a time. With ``rate`` (requests/s) an open one: they
    arrive as a Poisson process, at most ``concurrency`` at a time if that is not 0. Connections are
    kept alive, as by the clients of OpenAI.
    """
    room = asyncio.Semaphore(concurrency or len(prompts))
    rng = random.Random(seed)
    connections: list[Connection] = []

    async def one(prompt: Prompt) -> Result:
        async with room:
            return await complete(url, model, prompt, key, connections)

    began = time.perf_counter()
    tasks = []
    due = began
    for prompt in prompts:
        if rate:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += rng.expovariate(rate)
        tasks.append(asyncio.ensure_future(one(prompt)))
    results = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - began
    for connection in connections:
        connection.transport.close()
    return list(results), seconds


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours, as numpy's; 0 without values."""
    if not values:
        return 0.0
    ranks = sorted(values)
    at = share * (len(ranks) - 1)
    low = int(at)
    high = min(low + 1, len(ranks) - 1)
    return ranks[low] + (ranks[high] - ranks[low]) * (at - low)


def summary(
    results: Sequence[Result], seconds: float, goals: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Figures of one run; times in ms. ``goals``: bounds in ms on ``ttft``, ``tpot`` and ``e2e``
    that a request must keep to count as good."""
    good = [r for r in results if not r.error]
    series = {
        "ttft": [r.first_s for r in good],
        "tpot": [r.per_token_s for r in good if r.tokens > 1],
        "itl": [gap for r in good for gap in r.gaps_s],
        "e2e": [r.total_s for r in good],
    }
    tokens = sum(r.tokens for r in good)
    figures: dict[str, Any] = {
        "requests": len(results),
        "failed": len(results) - len(good),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "tokens_per_s": tokens / seconds,
        "all_tokens_per_s": (tokens + sum(r.prompt_tokens for r in good)) / seconds,
    }
    for name, values in series.items():
        figures[f"{name}_mean_ms"] = 1000 * sum(values) / len(values) if values else 0.0
        for share in (50, 90, 99):
            figures[f"{name}_p{share}_ms"] = 1000 * percentile(values, share / 100)
    if goals:
        num_good = sum(
            all(
                1000 * {"ttft": r.first_s, "tpot": r.per_token_s, "e2e": r.total_s}[name] <= bound
                for name, bound in goals.items()
            )
            for r in good
        )
        figures["goodput_per_s"] = num_good / seconds
    return figures
