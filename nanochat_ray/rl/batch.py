"""From graded groups of answers to a batch of the trainer.

Groups without signal are left out. Equal answers of a group are one sequence, whose weight is their
number: the gradient is the same, for less work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat_ray.data.packing import Conversation
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.losses import KINDS, TOKEN_INPUTS
from nanochat_ray.rl.rollout import Group
from nanochat_ray.train.step import Batch


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
    advantages = KINDS[config.loss].advantages(np.array(group.rewards))
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
    conversations: Sequence[Conversation] = (),
    rehearsal: float = 0.0,
    *,
    micro_batch_size: int,
    rank: int,
    world: int,
) -> Batch:
    """The part of a rank: whole micro-batches, which are the same for any number of ranks.

    ``conversations`` are trained on with the weight ``rehearsal``, unless no group has signal.
    """
    kind = KINDS[config.loss]
    answers = [a for group in groups if group.has_signal for a in distinct_answers(group, config)]
    num_tokens = np.repeat([len(a.indices) for a in answers], [a.count for a in answers])
    denominator = kind.denominator(num_tokens, config.max_tokens)
    talks = [TrainedSequence(c.ids, c.indices) for c in conversations if answers]
    # Of a mean over the conversations' tokens, whatever the answers' sum is divided by.
    talk_weight = rehearsal * denominator / max(1, sum(len(talk.indices) for talk in talks))
    # Micro-batches of nearly equal lengths.
    sequences = sorted([*answers, *talks], key=lambda sequence: len(sequence.ids))
    per_rank = -(-len(sequences) // (micro_batch_size * world)) * micro_batch_size
    own = sequences[rank * per_rank : (rank + 1) * per_rank]
    width = max((len(sequence.ids) for sequence in sequences), default=2)
    ids = np.zeros((len(own), width), dtype=np.int32)
    mask = np.zeros(ids.shape, dtype=np.uint8)
    inputs = {name: np.zeros(ids.shape, dtype=np.float32) for name in TOKEN_INPUTS}
    for row, sequence in enumerate(own):
        columns = sequence.indices
        ids[row, : len(sequence.ids)] = sequence.ids
        mask[row, columns] = 1
        inputs["weights"][row, columns] = sequence.count * kind.sequence_weight(len(columns))
        inputs["advantages"][row, columns] = sequence.advantage
        inputs["logprobs"][row, columns] = sequence.logprobs
        inputs["rehearsal"][row, columns] = 0.0 if sequence.count else talk_weight
    return Batch(
        *(ids, mask, inputs, denominator),
        metrics={"sequences": len(answers)},
        is_on_all_workers=(world - 1) * per_rank < len(sequences),
    )
