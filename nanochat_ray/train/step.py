"""One optimizer step: micro-batches in, one update out, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.schedule import lr_factor, momentum, window_share
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.train.config import TrainConfig


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
    """``loss``: mean nats per trained token of the global batch. ``applied``: weights moved.

    ``flags``: each rank's flags, summed over the ranks.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    lr_factor: float
    applied: bool
    flags: tuple[float, ...] = ()


def split(
    batch: Batch, micro_batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of ``ids [n, T]`` and ``targets [n, T]`` int64, -1 where nothing is learned."""
    for at in range(0, len(batch.ids), micro_batch_size):
        # Moved as they were stored and widened there: from a feed that pins its memory (train/
        # feed.py) the copy runs beside the computation.
        ids = (
            torch.from_numpy(batch.ids[at : at + micro_batch_size])
            .to(device, non_blocking=True)
            .long()
        )
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if batch.mask is not None:
            mask = torch.from_numpy(batch.mask[at : at + micro_batch_size]).to(
                device, non_blocking=True
            )
            targets = targets.masked_fill(mask[:, 1:] == 0, -1)
        yield inputs, targets


def train_step(
    model: GPT,
    optimizer: ShardedOptimizer,
    batch: Batch,
    step: int,
    config: TrainConfig,
    *,
    clip: float = 0.0,
    flags: Sequence[float] = (),
) -> StepResult:
    """Forward, backward and update for one global batch. Collective over the process group.

    The loss is the mean over all trained tokens of the global batch, so it does not depend on how
    the rows are cut into micro-batches or spread over workers. If the gradient is not finite the
    weights stay as they are and ``applied`` is false. ``clip`` bounds the gradient norm beside
    ``config.optim.grad_clip`` (0: not). ``flags`` travel with the loss: a word among the ranks
    that costs no exchange of its own.
    """
    device = optimizer.flats[0].weights.device
    optimizer.zero_grad()
    nats = torch.zeros((), device=device)
    count = torch.zeros((), device=device)
    # Gradients are summed at a fixed size near 1 and set right at the end, when the number of
    # trained tokens of all workers is known.
    nominal = config.global_batch_size * (batch.ids.shape[1] - 1)
    model.window_share = window_share(step, config.steps, config.window_warmup)
    first_micro = optimizer.rank * len(batch.ids) // config.micro_batch_size
    for micro, (inputs, targets) in enumerate(
        split(batch, config.micro_batch_size, device), first_micro
    ):
        if model.config.dropout:
            # Noise that depends on the place in the run alone: resumed or spread, it is the same.
            place = np.random.SeedSequence((config.seed, step, micro))
            torch.manual_seed(int(place.generate_state(1)[0]))
        loss = model.loss(inputs, targets, reduction="sum")
        if (micro - first_micro + 1) * config.micro_batch_size >= len(batch.ids):
            optimizer.last_backward()
        (loss / nominal).backward()
        nats += loss.detach()
        count += (targets >= 0).sum()
    said = torch.tensor(flags, dtype=torch.float64, device=device)
    totals = torch.cat([torch.stack([nats.double(), count.double()]), said])
    if optimizer.world > 1:
        dist.all_reduce(totals)
    sum_nats, trained, *heard = totals.tolist()
    factor = lr_factor(step, config.steps, config.optim)
    norm = optimizer.step(
        step,
        lr_factor=factor,
        momentum=momentum(step, config.steps, config.optim),
        scale=nominal / max(trained, 1.0),
        clip=min((c for c in (clip, config.optim.grad_clip) if c > 0), default=0.0),
    )
    return StepResult(
        loss=sum_nats / max(trained, 1.0),
        grad_norm=float(norm),
        trained_tokens=int(trained),
        lr_factor=factor,
        applied=bool(torch.isfinite(norm)),
        flags=tuple(heard),
    )
