"""Policy-gradient objectives: from rewards to advantages, weights of tokens, and a loss.

For each token with advantage A and weight w, log-probability l under the policy and b under the
engine that sampled it, and the ratio r = exp(l - b), a step minimises the sum of

- reinforce, rloo:       -w · A · l
- grpo, dapo, dr_grpo:   -w · min(r · A, clip(r, 1 - clip_low, 1 + clip_high) · A)
- gspo: the same with the sequence's ratio exp(mean(l - b)), whose gradient is shared by its tokens
- cispo:                 -w · stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) · A · l

Rollouts are on-policy to rounding, so all ratios are 1 up to the engine's last bits. With
``RLConfig.stale`` they are those of the step before: then reinforce and rloo minimise -w · r · A,
with the exact ratio, which is not clipped (importance sampling; its gradient is r · A · grad l).

Tokens of rehearsed conversations (``rehearsal.py``) have w = 0 and a weight v of their own, and add
-v · l.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl.config import Loss, RLConfig
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.step import MicroBatch

TOKEN_INPUTS = ("weights", "advantages", "logprobs", "rehearsal")
"""What ``PolicyLoss`` needs of each token: w, A, b and v above."""
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
    """How r enters."""

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """float64 ``[n]`` for the ``rewards [n]`` of a group.

        A = r - mean(r), or r minus the mean of the others; divided by std(r), with n - 1 degrees of
        freedom, if the kind says so.
        """
        deviations = rewards - rewards.mean()
        if self.baseline == "leave_one_out":
            # r_i - sum_{j≠i} r_j / (n - 1) = n / (n - 1) · (r_i - mean(r)).
            deviations = deviations * (len(rewards) / (len(rewards) - 1))
        if self.divides_by_std:
            deviations = deviations / (rewards.std(ddof=1) + STD_EPSILON)
        return deviations

    def sequence_weight(self, num_tokens: int) -> float:
        """Weight of each token of an answer that has ``num_tokens`` sampled ones."""
        return 1.0 / num_tokens if self.aggregation == "sequence_mean" else 1.0

    def denominator(self, num_tokens: np.ndarray, max_tokens: int) -> float:
        """What the weighted sum over all tokens is divided by; ``num_tokens [N]`` of all answers.
        1 if there are none."""
        if self.aggregation == "token_mean":
            return float(num_tokens.sum() or 1)
        return float(len(num_tokens) or 1) * (max_tokens if self.aggregation == "constant" else 1)


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


def surrogate(
    config: RLConfig,
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    sequences: Tensor,
    num_sequences: int,
) -> Tensor:
    """What is maximised, before weights, for each of N tokens; all float32 ``[N]``.

    ``logprobs`` has gradients, ``sampling_logprobs`` are the engine's; ``sequences`` int64 ``[N]``
    are the tokens' sequences, of ``num_sequences``.
    """
    ratio_kind = KINDS[config.loss].ratio
    if ratio_kind == "none" and not config.stale:
        return advantages * logprobs
    difference = logprobs - sampling_logprobs
    if ratio_kind == "none":
        return advantages * difference.exp()
    if ratio_kind == "sequence_clip":
        zeros = difference.new_zeros(num_sequences)
        sums = zeros.index_add(0, sequences, difference)
        num_tokens = zeros.index_add(0, sequences, torch.ones_like(difference))
        difference = (sums / num_tokens)[sequences]
    ratio = difference.exp()
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    match ratio_kind:
        case "weight":
            return clipped_ratio.detach() * advantages * logprobs
        case "clip" | "sequence_clip":
            return torch.minimum(ratio * advantages, clipped_ratio * advantages)
        case _:
            assert_never(ratio_kind)


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 of KL(policy ‖ reference) for each sampled token: exp(d) - d - 1 with
    d = reference - logprobs; never negative, and unbiased (joschu.net/blog/kl-approx.html)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


class PolicyLoss:
    """The objective of a run; asserts that engine and trainer agree."""

    def __init__(
        self, config: RLConfig, ranks: Ranks, *, max_diff: float, reference: GPT | None = None
    ):
        """``max_diff``: largest allowed difference of log-probabilities; 0: any."""
        self.config, self.ranks = config, ranks
        self.max_diff, self.reference = max_diff, reference
        self._sums: list[Tensor] = []
        """Of each micro-batch, behind its largest difference."""

    def loss(self, model: GPT, micro: MicroBatch) -> Tensor:
        weights, advantages, sampling_logprobs, rehearsal = (
            micro.token_inputs[name] for name in TOKEN_INPUTS
        )
        arguments = micro.inputs, micro.targets, micro.rows, self.config.temperature
        logprobs = model.token_logprobs(*arguments)
        num_sequences, T = micro.targets.shape
        sequences = micro.rows // T
        gain = surrogate(
            *(self.config, logprobs, sampling_logprobs, advantages, sequences, num_sequences)
        )
        divergence = torch.zeros_like(logprobs)
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference.token_logprobs(*arguments)
            divergence = kl_estimate(logprobs, reference)
        with torch.no_grad():
            difference = (logprobs - sampling_logprobs).abs()
            largest = difference.where(weights > 0, 0).max()
            sums = (weights * divergence, weights, -rehearsal * logprobs, rehearsal)
            self._sums.append(torch.stack([largest, *(values.sum() for values in sums)]))
        policy_loss = weights * (self.config.kl * divergence - gain)
        return (policy_loss - rehearsal * logprobs).sum()

    def finish(self) -> Mapping[str, float]:
        """``logprob_diff``: the largest difference between trainer and engine. FloatingPointError
        if it is above the bound: then the engine sampled from another policy. ``kl`` and
        ``rehearsal_loss``: nats per token, where the run has them."""
        data = torch.stack(self._sums).cpu().numpy().tobytes() if self._sums else b""
        self._sums = []
        sums = np.frombuffer(b"".join(self.ranks.gather(data)), dtype=np.float32).reshape(-1, 5)
        diff = float(sums[:, 0].max(initial=0.0))
        divergence, weight, rehearsal_loss, rehearsal_weight = sums[:, 1:].sum(axis=0).tolist()
        if not diff <= (self.max_diff or float("inf")):
            raise FloatingPointError(
                f"logprob_diff={diff:.3g}: the engine's log-probabilities of its samples differ "
                f"from the trainer's by more than max_logprob_diff={self.max_diff:g}, so the "
                "answers are not those of the policy in training"
            )
        figures = {"logprob_diff": diff}
        if self.reference is not None:
            figures["kl"] = divergence / max(weight, 1e-9)
        if rehearsal_weight:
            figures["rehearsal_loss"] = rehearsal_loss / rehearsal_weight
        return figures
