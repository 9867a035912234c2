"""What a task of Ray Data runs to read the sequences of one rank.

A worker process of Ray imports this file when it gets its first task, which a run waits for:
neither torch nor Ray's libraries are needed here (2 s of CPU time).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from nanochat_ray.data.shards import Manifest, SequenceReader, Split
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.rank_sequences import rank_sequences

Block = dict[str, np.ndarray]


@functools.lru_cache(maxsize=4)
def _reader(uri: str, manifest_json: str, split: Split) -> SequenceReader:
    # One reader for each process: its shards are verified once, then stay mapped.
    return SequenceReader(Store.at(uri), Manifest.from_json(manifest_json), split)


def rank_reader(
    uri: str, manifest: Manifest, config: TrainConfig, *, stride: int, rank: int, world: int
) -> Callable[[Block], Block]:
    """A function from ``{"first": [1]}``, a step, to the rank's sequences of ``stride`` steps:
    ``{"ids": [N, T + 1], "step": [N], ("mask": [N, T + 1])}``."""
    manifest_json, num_sequences = manifest.to_json(), manifest.num_sequences("train")

    def read(block: Block) -> Block:
        reader = _reader(uri, manifest_json, "train")
        first = int(block["first"][0])
        steps = range(first, min(first + stride, config.steps))
        indices = [rank_sequences(config, num_sequences, step, rank, world) for step in steps]
        ids, mask = reader.read(np.concatenate(indices))
        columns = {"ids": ids, "step": np.repeat(np.asarray(steps), [len(i) for i in indices])}
        return columns if mask is None else {**columns, "mask": mask}

    return read
