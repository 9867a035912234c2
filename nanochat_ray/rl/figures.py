"""What the records of a run say of sampled groups: of a step's, of a validation's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanochat_ray.rl.rollout import Group


def rewards_by_task(groups: Sequence[Group], names: Sequence[str]) -> dict[str, np.ndarray]:
    """float64 ``[questions, samples]`` of each task that was asked."""
    rewards = {
        name: [group.rewards for group in groups if group.question.task == number]
        for number, name in enumerate(names)
    }
    return {name: np.array(values) for name, values in rewards.items() if values}


def step_figures(groups: Sequence[Group], names: Sequence[str], seconds: float) -> dict[str, float]:
    """``seconds``: how long sampling took."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    logprobs = [x for rollout in rollouts for x in rollout.logprobs if x is not None]
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    by_task = rewards_by_task(groups, names)
    return {
        "reward": float(np.mean([group.reward for group in groups])),
        "groups": len(groups),
        "groups_with_signal": sum(group.has_signal for group in groups),
        "answer_tokens": tokens / len(rollouts),
        "truncated_share": sum(r.is_truncated for r in rollouts) / len(rollouts),
        # An unbiased estimate: the mean of -log p over samples of p.
        "entropy": -sum(logprobs) / max(len(logprobs), 1),
        "rollout_seconds": seconds,
        "rollout_tokens_per_s": tokens / seconds,
        **{f"reward/{name}": float(rewards.mean()) for name, rewards in by_task.items()},
    }


def validation_figures(groups: Sequence[Group], names: Sequence[str]) -> dict[str, float]:
    """``error_rate``, 1 - pass@1; pass@1 of each task and of all, and pass@k for k samples. Each
    task counts alike."""
    by_task = rewards_by_task(groups, names)
    mean = float(np.mean([rewards.mean() for rewards in by_task.values()]))
    best = float(np.mean([rewards.max(axis=1).mean() for rewards in by_task.values()]))
    return {
        "error_rate": 1 - mean,
        "pass@1": mean,
        f"pass@{len(groups[0].rewards)}": best,
        **{f"pass@1/{name}": float(rewards.mean()) for name, rewards in by_task.items()},
    }
