"""How long the stages of ``nanochat-ray quickstart`` take on a CPU: each is planned when it begins.

A plan follows from the time that is left and from how fast the stages before it really were, so
that the whole keeps its time on a machine that slows down or speeds up meanwhile. A run's schedule
depends on its length, so no stage is cut while it runs: what one takes too long, the next ones get
less. The ratios were measured on an AMD EPYC without other work (on_ray/BENCHMARKS.md), with some
room.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import TypeVar

from nanochat_ray.storage import Store

PROMISE_S = 690
"""Seconds that all of it may take: the promise is about 12 minutes."""
LEAST_BASE_MINUTES, BASE_MINUTES, MOST_BASE_MINUTES = 1.0, 3.5, 5.2
"""Base training: at least; before there are more than ``LEAST_RL_STEPS``; at most."""
LEAST_EPOCHS, EPOCHS, MOST_EPOCHS = 0.5, 1.0, 2.0
"""Passes of fine-tuning: at least; before there are more than ``LEAST_RL_STEPS``, as half a pass
leaves little to learn from; at most."""
SFT_MINUTES = 2.0
"""Of one pass, when base training begins."""
EPOCH_BASE_TOKENS = 1_050_000
"""A pass of fine-tuning takes as long as base training on n tokens."""
SFT_ROOM = 1.25
"""Fine-tuning is cut if it would take this many times as long, by the speed when it begins. It is
measured in a few seconds, in which another program may run, so less says nothing."""
LEAST_RL_STEPS, RL_STEPS, MOST_RL_STEPS = 20, 50, 60
"""Reinforcement learning: steps that show three quarters of the gain (rl/BENCHMARKS.md); planned
where there is time for them; and the default of ``nanochat-ray rl``."""
BASE_REST, SFT_REST, RL_REST = 4.2, 0.95, 0.5
"""When a stage begins, all that is not steps of training (start of jobs, validation, serving) still
takes this many times as long as it has taken until then."""
LEAST_OTHER_S = 40
"""Seconds until base training, at least: a small text is soon prepared, and the rest is as long."""
RL_SHARE = 2.5
"""When base training begins: the same for ``RL_STEPS`` steps, as no training was measured yet."""
RL_STEP_BASE_TOKENS, RL_STEP_SFT_TOKENS = 19_000, 15_000
"""A step of reinforcement learning takes as long as base training, or fine-tuning, on n tokens."""
PLAN = "quickstart.json"
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the plan of a stage follows from."""

    elapsed_s: float
    other_s: float
    """Of these seconds, those that were not steps of training."""
    tokens_per_s: float = 0.0
    """In the later half of the last training; 0: unknown."""

    def left_s(self, rest: float) -> float:
        """Seconds for steps, if all else takes ``rest`` times as long as until now."""
        return PROMISE_S - self.elapsed_s - rest * self.other_s


def measure(start: float, *runs: Store) -> Progress:
    """Progress since ``start``, of ``time.monotonic``, when these runs were trained, in order."""
    from nanochat_ray.train.metrics import read_records

    elapsed_s = time.monotonic() - start
    start_time = time.time() - elapsed_s  # steps before it are of an earlier start
    training_s = tokens_per_s = 0.0
    for run in runs:
        log = run.read_text("metrics.jsonl") if run.exists("metrics.jsonl") else ""
        steps = [record for record in read_records(log) if record["kind"] == "train"]
        training_s += sum(step["seconds"] for step in steps if step["time"] >= start_time)
        later = steps[len(steps) // 2 :]
        seconds = sum(step["seconds"] for step in later)
        tokens_per_s = sum(step["tokens"] for step in later) / seconds if later else 0.0
    return Progress(
        elapsed_s=elapsed_s, other_s=max(0.0, elapsed_s - training_s), tokens_per_s=tokens_per_s
    )


def base_minutes(progress: Progress, rl_steps: int | None = None) -> float:
    """Minutes of base training, before ``rl_steps`` steps of RL, or as many as can be spared."""
    progress = replace(progress, other_s=max(LEAST_OTHER_S, progress.other_s))

    def before(steps: int) -> float:
        return progress.left_s(BASE_REST + RL_SHARE * steps / RL_STEPS) / 60 - SFT_MINUTES

    if rl_steps is None:
        minutes = max(before(RL_STEPS), min(BASE_MINUTES, before(LEAST_RL_STEPS)))
    else:
        minutes = before(rl_steps)
    return round(min(MOST_BASE_MINUTES, max(LEAST_BASE_MINUTES, minutes)), 1)


def sft_epochs(progress: Progress, rl_steps: int | None = None) -> float:
    """Passes of fine-tuning, before ``rl_steps`` steps of RL, or as many as can be spared."""
    if not progress.tokens_per_s:
        return EPOCHS

    def before(steps: int) -> float:
        left_tokens = progress.left_s(SFT_REST) * progress.tokens_per_s
        return (left_tokens - steps * RL_STEP_BASE_TOKENS) / EPOCH_BASE_TOKENS

    if rl_steps is None:
        epochs = max(before(MOST_RL_STEPS), min(EPOCHS, before(LEAST_RL_STEPS)))
    else:
        epochs = before(rl_steps)
    return round(min(MOST_EPOCHS, max(LEAST_EPOCHS, epochs)), 1)


def sft_minutes(progress: Progress, epochs: float) -> float | None:
    """Bound on the minutes of these passes; of a resumed run the same, as its parent's speed is."""
    if not progress.tokens_per_s:
        return None
    return round(SFT_ROOM * epochs * EPOCH_BASE_TOKENS / progress.tokens_per_s / 60, 1)


def rl_steps(progress: Progress) -> int:
    """Steps of reinforcement learning."""
    if not progress.tokens_per_s:
        return RL_STEPS
    step_s = RL_STEP_SFT_TOKENS / progress.tokens_per_s
    return min(MOST_RL_STEPS, max(LEAST_RL_STEPS, int(progress.left_s(RL_REST) / step_s)))


def settle(run: Store, fresh: Number, usual: Number, progress: Progress) -> tuple[Number, str]:
    """The plan of a run and a remark: ``fresh``, unless the run has one, which it keeps.

    ``usual``: what was planned for this stage when base training began.
    """
    if run.exists(PLAN):
        return json.loads(run.read_text(PLAN)), ", as planned before"
    run.write_text(PLAN, json.dumps(fresh))
    if fresh == usual:
        return fresh, ""
    minutes = max(0.0, progress.left_s(0)) / 60
    speed = f"{progress.tokens_per_s:,.0f} tokens/s in the last training"
    return fresh, f", not {usual}: {minutes:.1f} minutes are left, {speed}"
