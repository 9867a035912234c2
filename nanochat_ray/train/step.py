"""One optimizer step: micro-batches in, one update out, the same for any number of workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_ray import machine
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
    """Rank 0: a checkpoint may follow this step and can be put without waiting
    (``CheckpointWriter.hold``)."""
    writer_error: bool = False
    """A rank: the last write of a checkpoint raised."""


@dataclass(frozen=True)
class Batch:
    """The sequences of one global batch that belong to one worker.

    ``ids`` is ``[n, T + 1]`` of any integer dtype; ``mask`` is ``[n, T + 1]`` with 1 where a token
    is trained on, or None if all are. T is the same on all workers; n may be 0 on some, unless the
    batch ``is_on_all_workers``.
    """

    ids: np.ndarray
    mask: np.ndarray | None = None
    token_inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What the objective needs of each token, by name: float32 ``[n, T + 1]``. With these there is
    a mask, and columns behind the last trained token of a micro-batch are left out."""
    denominator: float = 0.0
    """What the sum of the objective over the global batch is divided by; 0: the trained tokens."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures for the record of the step, the same on all workers."""
    is_on_all_workers: bool = True
    """Whether each worker has a sequence, the same on all. If not, no reduction starts within a
    backward pass: a worker without one would start its own in another order."""


class MicroBatch(NamedTuple):
    """Some of a worker's sequences, on the device."""

    inputs: Tensor
    """int64 ``[n, T]``"""
    targets: Tensor
    """int64 ``[n, T]``, -1 where no loss is taken."""
    rows: Tensor
    """int64 ``[N]``: where ``targets.flatten()`` is not -1, ascending; empty without token inputs.
    From the host: a GPU that counts the tokens itself makes the host wait for it."""
    token_inputs: Mapping[str, Tensor]
    """float32 ``[N]``, those of the targets in ``rows``."""


class Objective(Protocol):
    """What a step minimises."""

    def loss(self, model: GPT, micro: MicroBatch) -> Tensor:
        """The sum over the tokens of a micro-batch, a float32 scalar with gradients."""
        ...

    def finish(self) -> Mapping[str, float]:
        """Figures for the step's record, after the last micro-batch and before the update.

        Collective, with the same result on all workers; may raise, on all workers alike.
        """
        ...


class CrossEntropy:
    """Nats of the next token."""

    def loss(self, model: GPT, micro: MicroBatch) -> Tensor:
        return model.loss(micro.inputs, micro.targets, reduction="sum")

    def finish(self) -> Mapping[str, float]:
        return {}


@dataclass(frozen=True)
class StepResult:
    """``loss``: the objective of the global batch, by default mean nats per trained token.

    ``weights_updated`` is false if the gradient was not finite, or if the batch was empty.
    ``tokens`` counts all inputs of the global batch.
    """

    loss: float
    grad_norm: float
    trained_tokens: int
    lr_factor: float
    weights_updated: bool
    votes: RankVotes
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def split(batch: Batch, micro_batch_size: int, device: torch.device) -> Iterator[MicroBatch]:
    """Micro-batches of at most that many sequences."""

    def move(array: np.ndarray) -> Tensor:
        return machine.send(torch.from_numpy(np.ascontiguousarray(array)), device)

    for start in range(0, len(batch.ids), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        # Moved in the stored dtype and widened on the device: from pinned memory (data_loader.py)
        # the copy overlaps with the computation.
        width = _width(batch, part)
        ids = move(batch.ids[part, :width]).long()
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if batch.mask is not None:
            targets = targets.masked_fill(move(batch.mask[part, :width])[:, 1:] == 0, -1)
        rows, token_inputs = targets.new_empty(0), {}
        if batch.token_inputs:
            assert batch.mask is not None
            is_trained = batch.mask[part, 1:width] != 0
            rows = move(np.flatnonzero(is_trained))
            token_inputs = {
                name: move(array[part, 1:width][is_trained])
                for name, array in batch.token_inputs.items()
            }
        yield MicroBatch(inputs, targets, rows, token_inputs)


def _width(batch: Batch, part: slice) -> int:
    """Columns of a micro-batch: of sampled answers, whose lengths differ, those up to its last
    trained token. Prepared sequences are packed, and equal shapes suit a compiler."""
    if not batch.token_inputs or batch.mask is None:
        return batch.ids.shape[1]
    return int(np.flatnonzero(batch.mask[part].any(axis=0)).max(initial=1)) + 1


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
    objective: Objective = CrossEntropy(),  # noqa: B008 (immutable)
    clip: float = 0.0,
    votes: RankVotes = RankVotes(),  # noqa: B008 (immutable)
) -> StepResult:
    """Forward, backward and update for one global batch. Collective over the process group.

    The loss is the sum of ``objective`` over the tokens of the global batch, divided by its
    denominator, so it does not depend on how the sequences are split into micro-batches or over
    workers. If the gradient is not finite, or no worker has a sequence, the weights stay as they
    are and ``weights_updated`` is false. ``clip`` bounds the gradient norm in addition to
    ``config.optim.grad_clip`` (0: it does not).
    """
    # Gradients are accumulated for a fixed number of tokens, so at a size near 1, and scaled at
    # the end, when the number of trained tokens of all workers is known.
    nominal = config.global_batch_size * (batch.ids.shape[1] - 1)
    model.window_share = window_share(step, config.steps, config.window_warmup)
    totals = _accumulate(model, optimizer, batch, step, config, objective, nominal)
    own_votes = machine.send(torch.tensor(votes, dtype=torch.float64), totals.device)
    totals = torch.cat([totals, own_votes])
    if optimizer.world > 1:
        dist.all_reduce(totals)
    metrics = objective.finish()
    factor = lr_factor(step, config.steps, config.optim)
    norm = optimizer.step(
        step,
        lr_factor=factor,
        momentum=momentum(step, config.steps, config.optim),
        scale=nominal / (batch.denominator or totals[1].clamp_min(1.0)),
        clip=min((c for c in (clip, config.optim.grad_clip) if c > 0), default=0.0),
        active=totals[2] > 0,
    )
    # The step's only wait for a GPU, when all of it has been queued.
    results = torch.cat([totals, norm.double()[None]]).tolist()
    loss, trained_tokens, tokens, *vote_counts, grad_norm = results
    return StepResult(
        loss=loss / (batch.denominator or max(trained_tokens, 1.0)),
        grad_norm=grad_norm,
        trained_tokens=int(trained_tokens),
        lr_factor=factor,
        weights_updated=tokens > 0 and math.isfinite(grad_norm),
        votes=RankVotes(*(count > 0 for count in vote_counts)),
        tokens=int(tokens),
        metrics=metrics,
    )


def _accumulate(
    model: GPT,
    optimizer: ShardedOptimizer,
    batch: Batch,
    step: int,
    config: TrainConfig,
    objective: Objective,
    nominal: int,
) -> Tensor:
    """Leaves the gradient of objective / ``nominal`` in the optimizer's buffers.

    In reinforcement learning, where the weights choose the next batch, one rank sums the gradient
    in the two parts that two ranks would sum, so that both end with the same bits. Returns float64
    ``[3]`` of this worker: the sum of the objective, trained tokens, all tokens.
    """
    device = optimizer.flats[0].weights.device
    optimizer.zero_grad()
    total = torch.zeros((), device=device)
    count = torch.zeros((), device=device)
    tokens = 0
    num_micros = -(-len(batch.ids) // config.micro_batch_size)
    first_micro = optimizer.rank * len(batch.ids) // config.micro_batch_size
    # The last micro-batch of the first of two ranks, where one rank must sum as two would.
    boundary = -(-num_micros // 2) if config.stage == "rl" and optimizer.world == 1 else num_micros
    first_sum: list[Tensor] = []
    for index, micro in enumerate(split(batch, config.micro_batch_size, device)):
        if index == boundary:
            first_sum = [flat.grads.clone() for flat in optimizer.flats]
            optimizer.zero_grad()
        if model.config.dropout:
            _seed_dropout(config.seed, step, first_micro + index)
        loss = objective.loss(model, micro)
        if index + 1 == num_micros and batch.is_on_all_workers:
            optimizer.last_backward()
        (loss / nominal).backward()
        total += loss.detach()
        count += (micro.targets >= 0).sum()
        tokens += micro.inputs.numel()
    for flat, grads in zip(optimizer.flats, first_sum, strict=bool(first_sum)):
        flat.grads += grads
    # Without a copy from the host, for which a GPU would wait.
    return torch.stack([total.double(), count.double(), count.double() * 0 + tokens])
