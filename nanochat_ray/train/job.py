"""A whole training job as data, and its execution by one of the processes that share it.

``jobs/train.py`` runs ``execute`` in this process, under ``torchrun``, or (through
``on_ray.train``) in each worker of a Ray Train group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanochat_ray import config as configs
from nanochat_ray.checkpoint import snapshot
from nanochat_ray.config import ModelConfig, TrainConfig
from nanochat_ray.data.shards import Manifest, RowReader
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import loop, validation
from nanochat_ray.train.feed import from_shards
from nanochat_ray.train.step import Batch

CHECKED_BYTES = 512 << 20
"""Shards up to this size together are checked before a job starts, larger ones when opened."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What to train, on what, and where it goes. Names are folders under ``storage``."""

    storage: str
    dataset: str
    run: str
    model: ModelConfig
    train: TrainConfig
    parent: str = ""
    """Run whose weights this one starts from; empty starts from random weights."""
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return configs.to_json(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainJob:
        return cls(
            **{
                **values,
                "model": configs.from_json(ModelConfig, values["model"]),
                "train": configs.from_json(TrainConfig, values["train"]),
            }
        )


def open_dataset(storage: str, name: str) -> tuple[Store, Manifest, Tokenizer]:
    """A prepared dataset and its tokenizer. ValueError if there is none of that name."""
    root = Store.at(storage)
    dataset = root.child("datasets", name)
    if not dataset.exists("manifest.json"):
        have = root.list("datasets")
        raise ValueError(f"dataset={name!r} is not in {storage}; prepared there: {have or 'none'}")
    manifest = Manifest.load(dataset)
    tokenizer = Tokenizer.load(root.child("tokenizers", manifest.tokenizer[:16]))
    return dataset, manifest, tokenizer


def check(job: TrainJob) -> None:
    """Refuses what cannot train, before any worker starts. Raises ValueError."""
    dataset, manifest, tokenizer = open_dataset(job.storage, job.dataset)
    if manifest.kind != job.train.stage:
        raise ValueError(
            f"dataset={job.dataset!r} was prepared for stage {manifest.kind}, "
            f"not for {job.train.stage}"
        )
    if job.model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={job.model.vocab_size} does not fit dataset {job.dataset!r}, whose "
            f"tokenizer has {tokenizer.vocab_size} tokens"
        )
    if job.model.sequence_len < manifest.sequence_len:
        raise ValueError(
            f"sequence_len={job.model.sequence_len} is shorter than the rows of dataset "
            f"{job.dataset!r}, {manifest.sequence_len}"
        )
    if job.parent:
        parent = Store.at(job.storage).child("runs", job.parent)
        name = snapshot.latest(parent)
        if name is None:
            raise ValueError(f"parent={job.parent!r} has no checkpoint in {job.storage}")
        saved = snapshot.load_config(parent, name)
        if saved.tokenizer != tokenizer.fingerprint:
            raise ValueError(
                f"parent={job.parent!r} was trained with another tokenizer than dataset "
                f"{job.dataset!r}"
            )
    # A damaged shard is better found now than by a worker in the middle of a run.
    RowReader(dataset, manifest, "val").check(CHECKED_BYTES)
    RowReader(dataset, manifest, "train").check(CHECKED_BYTES)


def execute(
    job: TrainJob,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
    batches: Callable[[int], Iterator[Batch]] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains to the end, resuming what was begun; collective over the process group if any.

    ``batches`` replaces the plain reading of shards (Ray Data does). Returns the last metrics.
    """
    device = device or torch.device("cpu")
    config = job.train
    dataset, manifest, tokenizer = open_dataset(job.storage, job.dataset)
    root = Store.at(job.storage)
    model = GPT(job.model, compute_dtype=DTYPES[config.precision]).to(device)
    if job.parent:
        saved = snapshot.load(root.child("runs", job.parent), None, optimizer=False)
        model.load_state_dict(saved.weights)
    else:
        model.init_weights(torch.Generator().manual_seed(config.seed))
    if batches is None:
        batches = from_shards(RowReader(dataset, manifest, "train"), config, rank, world)
    return loop.run(
        model,
        loop.Run(
            config=config,
            store=root.child("runs", job.run),
            tokenizer=tokenizer,
            batches=batches,
            evaluate=validator(job, dataset, manifest, tokenizer, rank, world),
            report=report,
            should_stop=should_stop,
            about={**job.about, "dataset": job.dataset, "parent": job.parent},
        ),
    )


def validator(
    job: TrainJob, dataset: Store, manifest: Manifest, tokenizer: Tokenizer, rank: int, world: int
) -> Callable[[GPT], dict[str, float]]:
    """Validation on the first ``eval_rows`` rows of the "val" split, shared by the ranks."""
    reader = RowReader(dataset, manifest, "val")
    rows = np.arange(min(job.train.eval_rows, len(reader)), dtype=np.int64)
    ids, mask = reader.rows(np.array_split(rows, world)[rank])
    lengths = tokenizer.byte_lengths()

    def evaluate(model: GPT) -> dict[str, float]:
        micro = job.train.micro_rows
        if mask is None:
            return {
                "bits_per_byte": validation.bits_per_byte(model, ids, lengths, micro_rows=micro)
            }
        return {"val_loss": validation.masked_loss(model, ids, mask, micro_rows=micro)}

    return evaluate
