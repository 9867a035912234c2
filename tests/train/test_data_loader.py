"""Which sequences a rank reads in which step, and what prefetching passes on."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from nanochat_ray.data.order import global_batch_indices
from nanochat_ray.data.shards import SequenceReader
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.data_loader import ShardDataLoader, open_dataset, prefetch
from nanochat_ray.train.rank_sequences import rank_sequences
from nanochat_ray.train.step import Batch
from tests.tiny import TOKENIZER, write_dataset
from tests.waiting import wait_for

CONFIG = TrainConfig(steps=9, global_batch_size=5, micro_batch_size=5, seed=3)


@pytest.mark.parametrize(("world", "shares"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (5, [1] * 5)])
def test_ranks_read_neighbouring_parts(world: int, shares: list[int]) -> None:
    for step in (0, 4):
        parts = [rank_sequences(CONFIG, 12, step, rank, world) for rank in range(world)]
        assert [len(part) for part in parts] == shares
        golden = global_batch_indices(12, 3, 5, step)
        assert np.array_equal(np.concatenate(parts), golden)
    # The first epoch is in the order of the shards; step 2 goes on in the second.
    assert rank_sequences(CONFIG, 12, 1, 0, 1).tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("kind", ["base", "sft"])
def test_a_rank_reads_its_sequences_of_each_step(root: Store, kind: str) -> None:
    write_dataset(root, kind, kind, rows=12)
    dataset, manifest, tokenizer = open_dataset(root.uri, kind)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    reader = SequenceReader(dataset, manifest, "train")
    batches = list(ShardDataLoader(reader, CONFIG, 1, 2).batches(6))
    assert len(batches) == 3  # steps 6, 7 and 8
    for step, batch in enumerate(batches, start=6):
        ids, mask = reader.read(global_batch_indices(12, 3, 5, step)[3:])
        assert np.array_equal(batch.ids, ids)
        assert (batch.mask is None) == (kind == "base")
        assert mask is None or np.array_equal(batch.mask, mask)


def test_prefetch_passes_batches_on() -> None:
    ids = np.arange(6, dtype=np.uint16).reshape(2, 3)
    ids.flags.writeable = False
    mask = (ids % 2).astype(np.uint8)
    mask.flags.writeable = False
    batches = [Batch(ids, mask), Batch(ids, denominator=5.0, is_on_all_workers=False)]
    one, two = prefetch(iter(batches), pin=False)
    for batch in (one, two):
        assert np.array_equal(batch.ids, ids)
        assert batch.ids.flags.writeable  # torch refuses to share what is not
    assert one.mask is not None
    assert np.array_equal(one.mask, mask)
    assert one.mask.flags.writeable
    assert two.mask is None
    assert (two.denominator, two.is_on_all_workers) == (5.0, False)


def test_the_thread_ends_with_the_iterator() -> None:
    batch = Batch(np.zeros((1, 3), dtype=np.uint16))
    iterator = prefetch(itertools.repeat(batch), pin=False)
    next(iterator)
    threads = [thread for thread in threading.enumerate() if thread.name == "data-loader"]
    assert threads
    iterator.close()
    wait_for(lambda: not any(thread.is_alive() for thread in threads))


def test_a_missing_dataset_is_named(root: Store) -> None:
    with pytest.raises(ValueError, match=r"dataset='none' is not in .*; prepared there: none"):
        open_dataset(root.uri, "none")
    write_dataset(root, "base")
    with pytest.raises(ValueError, match=r"dataset='none' is not in .*: \['base'\]"):
        open_dataset(root.uri, "none")
