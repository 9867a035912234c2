"""Ray Data as the feed of training: each rank iterates over its own rows, in the order of contract.

The plan is a list of steps; a Ray Data task turns a few steps into the rows that one rank trains
on. ``streaming_split`` is not used: it gives rows to ranks by block boundaries and drops the
remainder, so the order would depend on the number of workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray.data
import ray.train
from ray.data import DataIterator, ExecutionOptions

from nanochat_ray.data.shards import Manifest, SequenceReader, Split
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.feed import rank_rows
from nanochat_ray.train.step import Batch

BLOCK_BYTES = 16 << 20
"""Rows that one task reads: large against the cost of a task, small against the object store."""


@functools.lru_cache(maxsize=4)
def _reader(uri: str, manifest_json: str, split: Split) -> SequenceReader:
    # One reader for each process: its shards are checked once, then stay mapped.
    return SequenceReader(Store.at(uri), Manifest.from_json(manifest_json), split)


def rank_dataset(
    dataset: Store, manifest: Manifest, config: TrainConfig, *, start: int, rank: int, world: int
) -> ray.data.Dataset:
    """Rows ``{"ids": [T + 1], ("mask": [T + 1],) "step": ()}`` of one rank from step ``start``."""
    uri, text = dataset.uri, manifest.to_json()
    num_rows = manifest.num_sequences("train")
    row_bytes = np.dtype(manifest.dtype).itemsize * (manifest.sequence_len + 1)
    rows = len(rank_rows(config, num_rows, start, rank, world))
    stride = max(1, min(BLOCK_BYTES // (rows * row_bytes), -(-(config.steps - start) // 4)))

    def read(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        reader = _reader(uri, text, "train")
        steps = range(int(block["first"][0]), min(int(block["first"][0]) + stride, config.steps))
        numbers = [rank_rows(config, num_rows, step, rank, world) for step in steps]
        ids, mask = reader.read(np.concatenate(numbers))
        batch = {"ids": ids, "step": np.repeat(np.asarray(steps), [len(n) for n in numbers])}
        return batch if mask is None else {**batch, "mask": mask}

    firsts = [{"first": step} for step in range(start, config.steps, stride)]
    plan = ray.data.from_items(firsts, override_num_blocks=len(firsts))
    plan.context.execution_options = ExecutionOptions(preserve_order=True)
    plan.context.enable_progress_bars = False
    # Two at a time: while one hands its rows over, the other reads.
    two = ray.data.TaskPoolStrategy(size=2)
    return plan.map_batches(read, batch_size=1, batch_format="numpy", compute=two, num_cpus=0.25)


class RankedRows(ray.train.DataConfig):
    """Gives each rank the iterator over its own rows, from the step that the run has reached."""

    def __init__(self, uri: str, manifest: Manifest, config: TrainConfig):
        super().__init__()
        self._uri, self._manifest, self._config = uri, manifest, config

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_args: Any, **_kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        # The one row of "train" is the first step; it was looked up when this group started.
        start = int(datasets["train"].take(1)[0]["start"])
        store = Store.at(self._uri)
        return [
            {
                "train": rank_dataset(
                    store, self._manifest, self._config, start=start, rank=rank, world=world_size
                ).iterator()
            }
            for rank in range(world_size)
        ]


def from_iterator(
    shard: DataIterator, config: TrainConfig, rank: int, world: int
) -> Callable[[int], Iterator[Batch]]:
    """Batches of one rank from its iterator, checked against the step that the loop is at."""

    def batches(start: int) -> Iterator[Batch]:
        rows = len(np.array_split(np.arange(config.global_batch_size), world)[rank])
        stream = shard.iter_batches(batch_size=rows, batch_format="numpy", prefetch_batches=4)
        for step, block in enumerate(stream, start):
            if (block["step"] != step).any():
                raise RuntimeError(
                    f"the feed of rank {rank} gave rows of step {block['step'][0]} at step {step}"
                )
            yield Batch(block["ids"], block.get("mask"))

    return batches
