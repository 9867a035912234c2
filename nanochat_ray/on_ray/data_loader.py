"""Ray Data as the data loader: each rank iterates over its own sequences, in training order.

The input of the Ray Data pipeline is a list of steps; one task turns a few steps into the sequences
of one rank. ``streaming_split`` is not used: it assigns rows to ranks by block boundaries and drops
the remainder, so the order would depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.data
import ray.train
from ray.data import DataIterator, ExecutionOptions

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


def step_dataset(start: int) -> ray.data.Dataset:
    """What carries the first step of a worker group to its ``RankDataConfig``, which runs in
    another process: its number of rows, which is known without an execution."""
    return ray.data.range(start + 1)


class RankDataConfig(ray.train.DataConfig):
    """Gives each rank the iterator over its own sequences, from the run's current step."""

    def __init__(self, uri: str, manifest: Manifest, config: TrainConfig):
        super().__init__()
        self._uri, self._manifest, self._config = uri, manifest, config

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_args: Any, **_kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        start = datasets["train"].count() - 1  # of step_dataset
        store = Store.at(self._uri)
        return [
            {
                "train": rank_dataset(
                    store, self._manifest, self._config, start=start, rank=rank, world=world_size
                ).iterator()
            }
            for rank in range(world_size)
        ]


class RayDataLoader:
    """One rank's batches from its iterator; checks that each is of the step that is due."""

    def __init__(self, iterator: DataIterator, config: TrainConfig, rank: int, world: int):
        self.iterator, self.config, self.rank, self.world = iterator, config, rank, world

    def batches(self, start: int) -> Iterator[Batch]:
        sequences = np.arange(self.config.global_batch_size)
        size = len(np.array_split(sequences, self.world)[self.rank])
        blocks = self.iterator.iter_batches(
            batch_size=size, batch_format="numpy", prefetch_batches=4
        )
        for step, block in enumerate(blocks, start):
            if (block["step"] != step).any():
                raise RuntimeError(
                    f"the data loader of rank {self.rank} gave sequences of step "
                    f"{block['step'][0]} at step {step}"
                )
            yield Batch(block["ids"], block.get("mask"))
