"""One optimizer step: micro-batches in, one update out, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_ray.config import TrainConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.schedule import lr_factor, momentum, window_share
from nanochat_ray.optim.sharded import ShardedOptimizer


@dataclass(frozen=True)
class Batch:
    """The rows of one global batch that belong to one worker.

    ``ids`` is ``[n, T + 1]`` of any integer dtype; ``mask`` is ``[n, T + 1]`` with 1 where a token
    is to be learned, or None if all are.
    """

    ids: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean nats per trained token of the global batch. ``applied``: weights moved."""

    loss: float
    grad_norm: float
    trained_tokens: int
    lr_factor: float
    applied: bool


def split(batch: Batch, micro_rows: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of ``ids [n, T]`` and ``targets [n, T]`` int64, -1 where nothing is learned."""
    for at in range(0, len(batch.ids), micro_rows):
        ids = torch.from_numpy(batch.ids[at : at + micro_rows].astype(np.int64))
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if batch.mask is not None:
            mask = torch.from_numpy(batch.mask[at : at + micro_rows, 1:].astype(bool))
            targets = targets.masked_fill(~mask, -1)
        if device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def train_step(
    model: GPT, optimizer: ShardedOptimizer, batch: Batch, step: int, config: TrainConfig
) -> StepResult:
    """Forward, backward and update for one global batch. Collective over the process group.

    The loss is the mean over all trained tokens of the global batch, so it does not depend on how
    the rows are cut into micro-batches or spread over workers. If the gradient is not finite the
    weights stay as they are and ``applied`` is false.
    """
    device = optimizer.flats[0].weights.device
    optimizer.zero_grad()
    nats = torch.zeros((), device=device)
    count = torch.zeros((), device=device)
    # Gradients are summed at a fixed size near 1 and set right at the end, when the number of
    # trained tokens of all workers is known.
    nominal = config.batch_rows * (batch.ids.shape[1] - 1)
    model.window_share = window_share(step, config)
    first_micro = optimizer.rank * len(batch.ids) // config.micro_rows
    for micro, (inputs, targets) in enumerate(split(batch, config.micro_rows, device), first_micro):
        if model.config.dropout:
            # Noise that depends on the place in the run alone: resumed or spread, it is the same.
            place = np.random.SeedSequence((config.seed, step, micro))
            torch.manual_seed(int(place.generate_state(1)[0]))
        loss = model.loss(inputs, targets, reduction="sum")
        if (micro - first_micro + 1) * config.micro_rows >= len(batch.ids):
            optimizer.last_backward()
        (loss / nominal).backward()
        nats += loss.detach()
        count += (targets >= 0).sum()
    totals = torch.stack([nats.double(), count.double()])
    if optimizer.world > 1:
        dist.all_reduce(totals)
    sum_nats, trained = totals.tolist()
    factor = lr_factor(step, config.steps, config.optim)
    norm = optimizer.step(
        step,
        lr_factor=factor,
        momentum=momentum(step, config.steps, config.optim),
        scale=nominal / max(trained, 1.0),
        clip=config.optim.grad_clip,
    )
    return StepResult(
        loss=sum_nats / max(trained, 1.0),
        grad_norm=float(norm),
        trained_tokens=int(trained),
        lr_factor=factor,
        applied=bool(torch.isfinite(norm)),
    )
