"""Ray Data as the data loader: each rank iterates over its own sequences, in training order.

The input of the Ray Data pipeline is a list of steps; one task turns a few steps into the sequences
of one rank. ``streaming_split`` is not used: it assigns rows to ranks by block boundaries and drops
the remainder, so the order would depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import ray.data
from ray.data import ExecutionOptions

from nanochat_ray.data.shards import Manifest
from nanochat_ray.on_ray.rank_reader import rank_reader
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.rank_sequences import rank_sequences
from nanochat_ray.train.step import Batch

BLOCK_BYTES = 16 << 20
"""Sequences that one task reads: large against the cost of a task, small against the object
store."""


def rank_dataset(
    dataset: Store, manifest: Manifest, config: TrainConfig, *, start: int, rank: int, world: int
) -> ray.data.Dataset:
    """One rank's sequences from step ``start``, in order.

    Rows are ``{"ids": [T + 1], ("mask": [T + 1],) "step": ()}``.
    """
    num_sequences = manifest.num_sequences("train")
    sequence_bytes = np.dtype(manifest.dtype).itemsize * (manifest.sequence_len + 1)
    step_bytes = len(rank_sequences(config, num_sequences, start, rank, world)) * sequence_bytes
    stride = max(1, min(BLOCK_BYTES // step_bytes, -(-(config.steps - start) // 4)))

    read = rank_reader(dataset.uri, manifest, config, stride=stride, rank=rank, world=world)
    firsts = [{"first": step} for step in range(start, config.steps, stride)]
    plan = ray.data.from_items(firsts, override_num_blocks=len(firsts))
    plan.context.execution_options = ExecutionOptions(preserve_order=True)
    plan.context.enable_progress_bars = plan.context.print_on_execution_start = False
    # Two at a time: one reads while the other hands its sequences over.
    two = ray.data.TaskPoolStrategy(size=2)
    return plan.map_batches(read, batch_size=1, batch_format="numpy", compute=two, num_cpus=0.25)


class RayDataLoader:
    """One rank's batches by Ray Data; checks that each is of the step that is due.

    The pipeline belongs to the worker. ``ray.train.get_dataset_shard`` would ask an actor for it,
    whose start and imports (3 s of CPU time) the worker group waits for.
    """

    def __init__(
        self, dataset: Store, manifest: Manifest, config: TrainConfig, rank: int, world: int
    ):
        self.dataset, self.manifest, self.config = dataset, manifest, config
        self.rank, self.world = rank, world

    def batches(self, start: int) -> Iterator[Batch]:
        sequences = np.arange(self.config.global_batch_size)
        size = len(np.array_split(sequences, self.world)[self.rank])
        rows = rank_dataset(
            self.dataset, self.manifest, self.config, start=start, rank=self.rank, world=self.world
        )
        blocks = rows.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=4)
        for step, block in enumerate(blocks, start):
            if (block["step"] != step).any():
                raise RuntimeError(
                    f"the data loader of rank {self.rank} gave sequences of step "
                    f"{block['step'][0]} at step {step}"
                )
            yield Batch(block["ids"], block.get("mask"))
