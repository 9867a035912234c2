"""From graded groups of answers to a batch of the trainer. numpy only.

Groups without signal are left out. Equal answers of a group are one sequence, whose weight is their
number: the gradient is the same, for less work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_ray.rl import advantages as adv
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.questions import Question
from nanochat_ray.rl.rollout import Rollout
from nanochat_ray.train.step import Batch

TOKEN_INPUTS = ("weights", "advantages", "logprobs")
"""What ``losses.PolicyLoss`` needs of each token; ``logprobs`` are the engine's."""


@dataclass(frozen=True)
class Group:
    """The answers to one question."""

    question: Question
    prompt: Sequence[int]
    rollouts: Sequence[Rollout]
    rewards: np.ndarray
    """float64 ``[samples]``"""

    @property
    def has_signal(self) -> bool:
        return bool(np.ptp(self.rewards) > 0)

    def to_wire(self) -> list[Any]:
        """JSON values, without the prompt."""
        rollouts = [rollout.to_wire() for rollout in self.rollouts]
        return [self.question.task, self.question.index, rollouts, self.rewards.tolist()]

    @classmethod
    def from_wire(cls, wire: Sequence[Any], prompts: Sequence[Sequence[Sequence[int]]]) -> Group:
        """``prompts``: token ids of each question of each task."""
        task, index, rollouts, rewards = wire
        answers = [Rollout.from_wire(rollout) for rollout in rollouts]
        return cls(Question(task, index), prompts[task][index], answers, np.array(rewards))


@dataclass(frozen=True)
class TrainedAnswer:
    """One distinct answer of a group."""

    prompt: Sequence[int]
    rollout: Rollout
    advantage: float
    count: int
    """Samples of the group that are this answer."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.rollout.tokens)

    @property
    def sampled_indices(self) -> list[int]:
        """Of the tokens that the model sampled, as opposed to a tool's output."""
        return [i for i, logprob in enumerate(self.rollout.logprobs) if logprob is not None]


def distinct_answers(group: Group, config: RLConfig) -> list[TrainedAnswer]:
    """The answers of a group that are trained on, in the order of their first sample."""
    counts: dict[tuple[int, ...], int] = {}
    values: dict[tuple[int, ...], tuple[Rollout, float]] = {}
    advantages = adv.advantages(group.rewards, adv.KINDS[config.loss])
    for rollout, advantage in zip(group.rollouts, advantages, strict=True):
        if rollout.is_truncated and config.truncation == "mask":
            continue
        key = tuple(rollout.tokens)
        counts[key] = counts.get(key, 0) + 1
        values.setdefault(key, (rollout, float(advantage)))
    return [TrainedAnswer(group.prompt, *values[key], count) for key, count in counts.items()]


def make_batch(
    groups: Sequence[Group],
    config: RLConfig,
    seconds: float,
    *,
    micro_batch_size: int,
    rank: int,
    world: int,
) -> Batch:
    """The part of a rank: whole micro-batches, which are the same for any number of ranks.

    ``seconds``: how long the rollouts took.
    """
    kind = adv.KINDS[config.loss]
    answers = [a for group in groups if group.has_signal for a in distinct_answers(group, config)]
    answers.sort(key=lambda answer: answer.length)  # micro-batches of nearly equal lengths
    num_tokens = np.array(
        [n for a in answers for n in [len(a.sampled_indices)] * a.count], dtype=np.int64
    )
    width = max((a.length for a in answers), default=2)
    per_rank = -(-len(answers) // (micro_batch_size * world)) * micro_batch_size
    own = answers[rank * per_rank : (rank + 1) * per_rank]
    ids = np.zeros((len(own), width), dtype=np.int32)
    mask = np.zeros(ids.shape, dtype=np.uint8)
    inputs = {name: np.zeros(ids.shape, dtype=np.float32) for name in TOKEN_INPUTS}
    for row, answer in enumerate(own):
        first, sampled_indices = len(answer.prompt), answer.sampled_indices
        columns = [first + i for i in sampled_indices]
        ids[row, : answer.length] = [*answer.prompt, *answer.rollout.tokens]
        mask[row, columns] = 1
        weight = answer.count * adv.sequence_weight(kind, len(columns))
        inputs["weights"][row, columns] = weight
        inputs["advantages"][row, columns] = answer.advantage
        inputs["logprobs"][row, columns] = [answer.rollout.logprobs[i] for i in sampled_indices]
    denominator = adv.denominator(kind, num_tokens, config.max_tokens) if answers else 1.0
    return Batch(ids, mask, inputs, denominator, figures(groups, config, len(answers), seconds))


def figures(
    groups: Sequence[Group], config: RLConfig, num_sequences: int, seconds: float
) -> dict[str, float]:
    """What the record of a step says of its rollouts."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    logprobs = [x for rollout in rollouts for x in rollout.logprobs if x is not None]
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    result = {
        "reward": float(np.mean([group.rewards.mean() for group in groups])),
        "groups": len(groups),
        "groups_with_signal": sum(group.has_signal for group in groups),
        "sequences": num_sequences,
        "answer_tokens": tokens / len(rollouts),
        "truncated_share": sum(r.is_truncated for r in rollouts) / len(rollouts),
        # An unbiased estimate: the mean of -log p over samples of p.
        "entropy": -sum(logprobs) / max(len(logprobs), 1),
        "rollout_seconds": seconds,
        "rollout_tokens_per_s": tokens / seconds,
    }
    for number, name in enumerate(config.tasks):
        rewards = [g.rewards.mean() for g in groups if g.question.task == number]
        if rewards:
            result[f"reward/{name}"] = float(np.mean(rewards))
    return result
