"""How long a prompt that comes among answers holds them up."""

from __future__ import annotations

import asyncio
import random

from nanochat_ray.bench import load


async def long_prompt_delay(
    url: str,
    model: str,
    *,
    vocab: int,
    key: str = "",
    streams: int = 16,
    length: int = 1900,
    seed: int = 0,
) -> float:
    """By how much the latest token of ``streams`` answers is late while a prompt of ``length``
    tokens comes among them, in median times between tokens. ValueError if a request fails."""
    rng = random.Random(seed)
    warmup_tokens = 40
    """Tokens after which all answers run; each has more to come when the prompt is done."""
    running = [
        load.Prompt([rng.randrange(vocab) for _ in range(64)], warmup_tokens + 10 + length // 16)
        for _ in range(streams)
    ]
    long = load.Prompt([rng.randrange(vocab) for _ in range(length)], 4)
    answers = asyncio.ensure_future(load.drive(url, model, running, concurrency=streams, key=key))
    # One more answer is waited for first: until all have begun, the gaps are those of their own
    # prompts.
    (probe,), _ = await load.drive(
        url, model, [load.Prompt([1, 2, 3], 2 * warmup_tokens)], concurrency=1, key=key
    )
    late = await load.complete(url, model, long, key)
    results, _ = await answers
    if error := next((r.error for r in (*results, probe, late) if r.error), ""):
        raise ValueError(f"{url}: {error}")
    gaps = [gap for r in results for gap in r.gaps_s[warmup_tokens:]]
    return max(gaps) / load.percentile(gaps, 0.5) - 1
