"""What keeps a run from diverging, and what notices that it has: spikes, NaN and infinity."""

from __future__ import annotations

import math
import statistics

import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.metrics import NORM_WINDOW, Metrics
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.step import Batch, StepResult, split

MAX_SKIPPED_STEPS = 5
"""Consecutive steps with a gradient that is not finite before the run gives up."""


class DivergenceGuard:
    """Checks every step and every checkpoint of a run. Errors are raised on every rank alike."""

    def __init__(
        self, model: GPT, config: TrainConfig, metrics: Metrics, ranks: Ranks, store: Store
    ):
        self.model, self.config, self.metrics = model, config, metrics
        self.ranks, self.store = ranks, store
        self.skipped_steps = 0
        """Consecutive steps up to now whose gradient was not finite."""

    def spike_bound(self) -> float:
        """The bound of gradient-spike clipping for the next step; 0 is none."""
        norms = self.metrics.grad_norms(NORM_WINDOW) if self.config.spike_clip else []
        if len(norms) < NORM_WINDOW // 2:
            return 0.0
        return self.config.spike_clip * statistics.median(norms)

    def check_step(self, step: int, result: StepResult) -> None:
        """FloatingPointError after too many consecutive steps that did not move the weights."""
        self.skipped_steps = 0 if math.isfinite(result.grad_norm) else self.skipped_steps + 1
        if self.skipped_steps >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"the gradient was not finite in {self.skipped_steps} steps up to step {step} "
                f"(loss {result.loss}): the run has diverged; {self._advice()}"
            )

    def check_weights(self, step: int, loss: float, metric: float | None, batch: Batch) -> None:
        """FloatingPointError if the weights give a loss that is not finite. Collective.

        ``loss`` is that before the step. Where no validation (``metric``) has used the weights
        since, the first micro-batch of ``batch`` runs forward once more.
        """

        def check() -> None:
            after = metric if metric is not None else self._forward_loss(batch)
            kind = "validation" if metric is not None else "training loss after it"
            for name, value in (("training loss", loss), (kind, after)):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the run has diverged at step {step}: its {name} is {value}. That "
                        f"checkpoint is not written; {self._advice()}"
                    )

        self.ranks.run_together(check)

    @torch.no_grad()
    def _forward_loss(self, batch: Batch) -> float:
        micro = next(split(batch, self.config.micro_batch_size, self.ranks.device), None)
        if micro is None:  # an empty batch has left the weights as they were
            return 0.0
        self.model.eval()
        loss = float(self.model.loss(micro.inputs, micro.targets, reduction="sum"))
        self.model.train()
        return loss

    def _advice(self) -> str:
        name = checkpoint.latest(self.store)
        advice = "train another run with lower learning rates or grad_clip"
        if name is None:
            return f"there is no earlier one: {advice}"
        return f"the last one, {name}, is sound: {advice}, or look at it first"
