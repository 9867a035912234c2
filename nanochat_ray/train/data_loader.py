"""Batches straight from the shards, in the deterministic data order, with prefetching."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from nanochat_ray.checks import check_name
from nanochat_ray.data.shards import Manifest, SequenceReader
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer, folder_of
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.rank_sequences import rank_sequences
from nanochat_ray.train.step import Batch

PREFETCH_BATCHES = 2
"""Batches that are ready before the trainer needs them."""


class DataLoader(Protocol):
    """The batches of one rank."""

    def batches(self, start: int) -> Iterator[Batch]:
        """This rank's batch of step ``start``, of the next, and so on to the last step."""
        ...


def open_dataset(storage: str, name: str) -> tuple[Store, Manifest, Tokenizer]:
    """A prepared dataset and its tokenizer. ValueError if there is none of that name."""
    check_name("dataset", name)
    root = Store.at(storage)
    dataset = root.child("datasets", name)
    if not dataset.exists("manifest.json"):
        datasets = root.list("datasets") or "none"
        raise ValueError(f"dataset={name!r} is not in {storage}; prepared there: {datasets}")
    manifest = Manifest.load(dataset)
    tokenizer = Tokenizer.load(folder_of(root, manifest.tokenizer), manifest.tokenizer)
    return dataset, manifest, tokenizer


class ShardDataLoader:
    """Reads one rank's sequences from the shards, without Ray."""

    def __init__(self, reader: SequenceReader, config: TrainConfig, rank: int, world: int):
        self.reader, self.config, self.rank, self.world = reader, config, rank, world

    def batches(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.config.steps):
            sequences = rank_sequences(self.config, len(self.reader), step, self.rank, self.world)
            ids, mask = self.reader.read(sequences)
            yield Batch(ids, mask)


def _to_host_buffer(array: np.ndarray, *, pin: bool) -> np.ndarray:
    """The array as a step can take it: writable, since torch refuses to share what is not.

    ``pin`` copies it into page-locked memory, from which a GPU reads while the CPU continues.
    """
    if not pin:
        return np.require(array, requirements="W")
    pinned_tensor = torch.empty(
        array.shape, dtype=torch.from_numpy(array[:0]).dtype, pin_memory=True
    )
    copy = pinned_tensor.numpy()  # keeps the tensor alive
    copy[...] = array
    return copy


def prefetch(
    batches: Iterator[Batch], *, pin: bool, depth: int = PREFETCH_BATCHES
) -> Generator[Batch, None, None]:
    """The same batches, produced by a thread that is at most ``depth`` ahead of the consumer.

    ``pin`` puts them into page-locked memory. An exception of ``batches`` is raised here, after
    the batches before it. The thread ends with the iterator.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def enqueue(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def produce() -> None:
        try:
            for batch in batches:
                mask = None if batch.mask is None else _to_host_buffer(batch.mask, pin=pin)
                enqueue(replace(batch, ids=_to_host_buffer(batch.ids, pin=pin), mask=mask))
                if stop.is_set():
                    return
            enqueue(None)
        except BaseException as error:  # raised in the consumer's thread
            enqueue(error)

    thread = threading.Thread(target=produce, name="data-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
