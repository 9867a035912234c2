"""Gauges and counters of an engine, from which metrics are made. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Current gauges, and counters since the start."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    kernels: str = "torch"
    """What computes: the instructions that the C kernels use (amx, avx512, ...), or torch."""
    kv_cache_usage: float = 0.0
    """Share of the KV cache that is in use, from 0 to 1."""
    steps: int = 0
    step_seconds: float = 0.0
    """Time spent in steps, in total."""
    prompt_tokens: int = 0
    """Tokens computed in prompt chunks (recomputation included)."""
    generated_tokens: int = 0
    num_lookup_tokens: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    num_hit_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    num_queued: int = 0
    """Requests that had to wait for a slot and have their first token."""
    queue_seconds: float = 0.0
    """Until that token, of all these."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    """Draft tokens that equal the sampled ones."""
    preemptions: int = 0
    num_finished: int = 0
