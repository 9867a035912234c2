"""From graded groups of answers to a batch of the trainer. numpy only.

Groups without signal are left out. Equal answers of a group are one sequence, whose weight is their
number: the gradient is the same, for less work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_ray.rl import advantages as adv
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.losses import TOKEN_INPUTS
from nanochat_ray.rl.questions import Question
from nanochat_ray.rl.rehearsal import Conversation
from nanochat_ray.rl.rollout import Rollout
from nanochat_ray.train.step import Batch


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
class TrainedSequence:
    """A distinct answer of a group behind its prompt, or a rehearsed conversation."""

    ids: Sequence[int] | np.ndarray
    indices: np.ndarray
    """Of the tokens that are trained on; a tool's output is not."""
    count: int = 0
    """Samples of the group that are this answer."""
    advantage: float = 0.0
    logprobs: np.ndarray | float = 0.0
    """The engine's, of the trained tokens."""


def distinct_answers(group: Group, config: RLConfig) -> list[TrainedSequence]:
    """The answers of a group that are trained on, in the order of their first sample."""
    advantages = adv.advantages(group.rewards, adv.KINDS[config.loss])
    counts = Counter(tuple(rollout.tokens) for rollout in group.rollouts)
    answers = []
    for rollout, advantage in zip(group.rollouts, advantages, strict=True):
        count = counts.pop(tuple(rollout.tokens), 0)
        if not count or (rollout.is_truncated and config.truncation == "mask"):
            continue
        logprobs = np.array(rollout.logprobs, dtype=np.float64)  # None becomes NaN
        sampled_indices = np.flatnonzero(~np.isnan(logprobs))
        answers.append(
            TrainedSequence(
                [*group.prompt, *rollout.tokens],
                len(group.prompt) + sampled_indices,
                count,
                float(advantage),
                logprobs[sampled_indices],
            )
        )
    return answers


def make_batch(
    groups: Sequence[Group],
    config: RLConfig,
    seconds: float,
    *,
    conversations: Sequence[Conversation] = (),
    micro_batch_size: int,
    rank: int,
    world: int,
) -> Batch:
    """The part of a rank: whole micro-batches, which are the same for any number of ranks.

    ``seconds``: how long the rollouts took. ``conversations`` are rehearsed with the weight
    ``config.rehearsal``, unless no group has signal.
    """
    kind = adv.KINDS[config.loss]
    answers = [a for group in groups if group.has_signal for a in distinct_answers(group, config)]
    num_tokens = np.repeat([len(a.indices) for a in answers], [a.count for a in answers])
    denominator = adv.denominator(kind, num_tokens, config.max_tokens) if answers else 1.0
    talks = [TrainedSequence(c.ids, c.indices) for c in conversations if answers]
    # Of a mean over the conversations' tokens, whatever the answers' sum is divided by.
    rehearsal = (config.rehearsal or 0.0) * denominator
    rehearsal /= max(1, sum(len(sequence.indices) for sequence in talks))
    # Micro-batches of nearly equal lengths.
    sequences = sorted([*answers, *talks], key=lambda sequence: len(sequence.ids))
    width = max((len(sequence.ids) for sequence in sequences), default=2)
    per_rank = -(-len(sequences) // (micro_batch_size * world)) * micro_batch_size
    own = sequences[rank * per_rank : (rank + 1) * per_rank]
    ids = np.zeros((len(own), width), dtype=np.int32)
    mask = np.zeros(ids.shape, dtype=np.uint8)
    inputs = {name: np.zeros(ids.shape, dtype=np.float32) for name in TOKEN_INPUTS}
    for row, sequence in enumerate(own):
        columns = sequence.indices
        ids[row, : len(sequence.ids)] = sequence.ids
        mask[row, columns] = 1
        inputs["weights"][row, columns] = sequence.count * adv.sequence_weight(kind, len(columns))
        inputs["advantages"][row, columns] = sequence.advantage
        inputs["logprobs"][row, columns] = sequence.logprobs
        inputs["rehearsal"][row, columns] = 0.0 if sequence.count else rehearsal
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
