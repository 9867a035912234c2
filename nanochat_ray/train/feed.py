"""Batches straight from the shards, for training without Ray: the order of contract, no more."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch

from nanochat_ray.data.order import global_batch_indices
from nanochat_ray.data.shards import SequenceReader
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.step import Batch

AHEAD = 2
"""Batches that are ready before they are asked for."""


def rank_rows(config: TrainConfig, num_rows: int, step: int, rank: int, world: int) -> np.ndarray:
    """Row numbers (int64) that ``rank`` of ``world`` trains on in ``step``: a run of the batch.

    Where the sizes divide, the micro-batches of all ranks are those that one rank would make.
    """
    rows = global_batch_indices(num_rows, config.seed, config.global_batch_size, step)
    return np.array_split(rows, world)[rank]


def from_shards(
    reader: SequenceReader, config: TrainConfig, rank: int, world: int
) -> Callable[[int], Iterator[Batch]]:
    """This rank's batches from any step on."""

    def batches(start: int) -> Iterator[Batch]:
        for step in range(start, config.steps):
            ids, mask = reader.read(rank_rows(config, len(reader), step, rank, world))
            yield Batch(ids, mask)

    return batches


def _ready(array: np.ndarray, *, pin: bool) -> np.ndarray:
    """The array as a step can take it: writable, since torch refuses to share what is not.

    ``pin`` makes a copy in page-locked memory, from which a GPU reads while the CPU goes on.
    """
    if not pin:
        return np.require(array, requirements="W")
    held = torch.empty(array.shape, dtype=torch.from_numpy(array[:0]).dtype, pin_memory=True)
    copy = held.numpy()  # keeps the tensor alive
    copy[...] = array
    return copy


def prefetched(
    batches: Iterator[Batch], *, pin: bool, ahead: int = AHEAD
) -> Generator[Batch, None, None]:
    """The same batches, made by a thread that stays at most ``ahead`` of who asks.

    ``pin`` puts them into page-locked memory. What ``batches`` raises is raised here, in its
    place; the thread ends with the iterator.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=ahead)
    ended = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def make() -> None:
        try:
            for batch in batches:
                mask = None if batch.mask is None else _ready(batch.mask, pin=pin)
                put(Batch(_ready(batch.ids, pin=pin), mask))
                if ended.is_set():
                    return
            put(None)
        except BaseException as error:  # raised in the thread that asks
            put(error)

    thread = threading.Thread(target=make, name="feed", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
