"""What an engine tells of itself: gauges and counters, which metrics are made of. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Stats:
    """Gauges of the moment and counters since the start."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    kernels: str = "torch"
    """What computes: the instructions that the C kernels use (amx, avx512, ...), or torch."""
    kv_used: float = 0.0
    """Share of the cache's tokens that are in use."""
    steps: int = 0
    step_seconds: float = 0.0
    """Time spent in steps, in all."""
    prompt_tokens: int = 0
    """Tokens computed in prompt chunks (recomputation included)."""
    generated_tokens: int = 0
    prefix_queried: int = 0
    """Prompt tokens that were looked up in the prefix cache, and those found there."""
    prefix_hit: int = 0
    drafted: int = 0
    """Tokens that were guessed, and guesses that held."""
    draft_accepted: int = 0
    preemptions: int = 0
    finished: int = 0
