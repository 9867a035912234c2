"""One optimizer step: micro-batches in, one update out, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.schedule import lr_factor, momentum, window_share
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.train.config import TrainConfig


class RankVotes(NamedTuple):
    """What no rank can decide alone. Votes travel with the loss, so they cost no collective of
    their own; the result of a step has for each field whether any rank voted for it."""

    stop: bool = False
    """A rank wants to stop after this step."""
    poll: bool = False
    """Rank 0: it is time to call ``Hooks.should_save``."""
    writer_idle: bool = False
    """Rank 0: no checkpoint is being written."""
    writer_error: bool = False
    """A rank: the last write of a checkpoint raised."""


@dataclass(frozen=True)
class Batch:
    """The sequences of one global batch that belong to one worker.

    ``ids`` is ``[n, T + 1]`` of any integer dtype; ``mask`` is ``[n, T + 1]`` with 1 where a token
    is trained on, or None if all are.
    """

    ids: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean nats per trained token of the global batch.

    ``weights_updated`` is false if the gradient was not finite.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    lr_factor: float
    weights_updated: bool
    votes: RankVotes


def split(
    batch: Batch, micro_batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of ``ids [n, T]`` and ``targets [n, T]`` int64, -1 where no loss is taken."""
    for start in range(0, len(batch.ids), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        # Moved in the stored dtype and widened on the device: from pinned memory (data_loader.py)
        # the copy overlaps with the computation.
        ids = torch.from_numpy(batch.ids[part]).to(device, non_blocking=True).long()
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if batch.mask is not None:
            mask = torch.from_numpy(batch.mask[part]).to(device, non_blocking=True)
            targets = targets.masked_fill(mask[:, 1:] == 0, -1)
        yield inputs, targets


def _seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """The noise depends on the position in the run alone: it is the same after a resume and on
    other workers."""
    seeds = np.random.SeedSequence((seed, step, micro_batch))
    torch.manual_seed(int(seeds.generate_state(1)[0]))


def train_step(
    model: GPT,
    optimizer: ShardedOptimizer,
    batch: Batch,
    step: int,
    config: TrainConfig,
    *,
    clip: float = 0.0,
    votes: RankVotes = RankVotes(),  # noqa: B008 (immutable)
) -> StepResult:
    """Forward, backward and update for one global batch. Collective over the process group.

    The loss is the mean over all trained tokens of the global batch, so it does not depend on how
    the sequences are split into micro-batches or over workers. If the gradient is not finite, the
    weights stay as they are and ``weights_updated`` is false. ``clip`` bounds the gradient norm in
    addition to ``config.optim.grad_clip`` (0: it does not).
    """
    device = optimizer.flats[0].weights.device
    optimizer.zero_grad()
    nats = torch.zeros((), device=device)
    count = torch.zeros((), device=device)
    # Gradients are accumulated for a fixed number of tokens, so at a size near 1, and scaled at
    # the end, when the number of trained tokens of all workers is known.
    nominal = config.global_batch_size * (batch.ids.shape[1] - 1)
    model.window_share = window_share(step, config.steps, config.window_warmup)
    first_micro = optimizer.rank * len(batch.ids) // config.micro_batch_size
    for micro, (inputs, targets) in enumerate(
        split(batch, config.micro_batch_size, device), first_micro
    ):
        if model.config.dropout:
            _seed_dropout(config.seed, step, micro)
        loss = model.loss(inputs, targets, reduction="sum")
        if (micro - first_micro + 1) * config.micro_batch_size >= len(batch.ids):
            optimizer.last_backward()
        (loss / nominal).backward()
        nats += loss.detach()
        count += (targets >= 0).sum()
    own_votes = torch.tensor(votes, dtype=torch.float64, device=device)
    totals = torch.cat([torch.stack([nats.double(), count.double()]), own_votes])
    if optimizer.world > 1:
        dist.all_reduce(totals)
    sum_nats, trained_tokens, *vote_counts = totals.tolist()
    factor = lr_factor(step, config.steps, config.optim)
    norm = optimizer.step(
        step,
        lr_factor=factor,
        momentum=momentum(step, config.steps, config.optim),
        scale=nominal / max(trained_tokens, 1.0),
        clip=min((c for c in (clip, config.optim.grad_clip) if c > 0), default=0.0),
    )
    return StepResult(
        loss=sum_nats / max(trained_tokens, 1.0),
        grad_norm=float(norm),
        trained_tokens=int(trained_tokens),
        lr_factor=factor,
        weights_updated=bool(torch.isfinite(norm)),
        votes=RankVotes(*(count > 0 for count in vote_counts)),
    )
