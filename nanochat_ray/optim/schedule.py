"""Schedules of learning rate, momentum and window size: pure functions of the step."""

from __future__ import annotations

from nanochat_ray.optim.config import OptimConfig


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the full rate at ``step`` (from 0) of ``steps``: linear up, flat, linear down."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    warmdown = round(config.warmdown_ratio * steps)
    remaining = steps - step
    if remaining >= warmdown:
        return 1.0
    return config.final_lr_frac + (1 - config.final_lr_frac) * remaining / warmdown


def momentum(step: int, steps: int, config: OptimConfig) -> float:
    """Muon's momentum: from 0.85 up to its full value in the first tenth, at most 300 steps."""
    rise = max(1, min(300, steps // 10))
    share = min(1.0, step / rise)
    first = min(0.85, config.momentum)
    return first + (config.momentum - first) * share


def window_share(step: int, steps: int, window_warmup: float) -> float:
    """Share of each attention window that training sees: a quarter, a half, three quarters, all.

    modded-nanogpt's window warmup, in equal stages over ``window_warmup`` of the steps.
    """
    rise = round(window_warmup * steps)
    return 1.0 if step >= rise else (1 + 3 * step // rise) / 4
