"""From rewards to advantages and weights of tokens. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nanochat_ray.rl.config import Loss

Baseline = Literal["mean", "leave_one_out"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]
Ratio = Literal["none", "clip", "sequence_clip", "weight"]
STD_EPSILON = 1e-6
"""Added to a group's standard deviation (GRPO's and DAPO's reference code)."""


@dataclass(frozen=True)
class LossKind:
    """The choices in which the objectives of ``RLConfig.loss`` differ."""

    baseline: Baseline = "mean"
    divides_by_std: bool = False
    aggregation: Aggregation = "token_mean"
    ratio: Ratio = "none"
    """How the ratio of the policy to the one that sampled enters; see ``losses.py``."""


KINDS: dict[Loss, LossKind] = {
    # Williams 1992, with the group's mean as baseline and a mean over tokens, as nanochat's
    # chat_rl does it.
    "reinforce": LossKind(),
    # Ahmadian et al., arXiv 2402.14740: the mean of the other answers as baseline, and the
    # log-probability of the answer as a whole.
    "rloo": LossKind(baseline="leave_one_out", aggregation="sequence_sum"),
    # Shao et al., arXiv 2402.03300.
    "grpo": LossKind(divides_by_std=True, aggregation="sequence_mean", ratio="clip"),
    # Yu et al., arXiv 2503.14476: a mean over tokens (and clip_high above clip_low).
    "dapo": LossKind(divides_by_std=True, ratio="clip"),
    # Liu et al., arXiv 2503.20783: no division by std or by the length.
    "dr_grpo": LossKind(aggregation="constant", ratio="clip"),
    # Zheng et al., arXiv 2507.18071: one ratio for a sequence.
    "gspo": LossKind(divides_by_std=True, aggregation="sequence_mean", ratio="sequence_clip"),
    # MiniMax, arXiv 2506.13585: the clipped ratio is a constant weight.
    "cispo": LossKind(divides_by_std=True, ratio="weight"),
}


def advantages(rewards: np.ndarray, kind: LossKind) -> np.ndarray:
    """float64 ``[n]`` for the ``rewards [n]`` of a group.

    A = r - mean(r), or r minus the mean of the others; divided by std(r), with n - 1 degrees of
    freedom, if the kind says so.
    """
    deviations = rewards - rewards.mean()
    if kind.baseline == "leave_one_out":
        # r_i - sum_{j≠i} r_j / (n - 1) = n / (n - 1) · (r_i - mean(r)).
        deviations = deviations * (len(rewards) / (len(rewards) - 1))
    if kind.divides_by_std:
        deviations = deviations / (rewards.std(ddof=1) + STD_EPSILON)
    return deviations


def sequence_weight(kind: LossKind, num_tokens: int) -> float:
    """Weight of each token of an answer that has ``num_tokens`` sampled ones."""
    return 1.0 / num_tokens if kind.aggregation == "sequence_mean" else 1.0


def denominator(kind: LossKind, num_tokens: np.ndarray, max_tokens: int) -> float:
    """What the weighted sum over all tokens is divided by; ``num_tokens [N]`` of all answers."""
    if kind.aggregation == "token_mean":
        return float(num_tokens.sum())
    if kind.aggregation == "constant":
        return float(len(num_tokens) * max_tokens)
    return float(len(num_tokens))
