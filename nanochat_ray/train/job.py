"""A whole training job as data, and its execution by one of the processes that share it.

``nanochat-ray train`` runs ``execute`` in this process, under ``torchrun``, or (through
``on_ray.train``) in each worker of a Ray Train group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from nanochat_ray import config as configs
from nanochat_ray import machine
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import check_name
from nanochat_ray.data.shards import Manifest, SequenceReader
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES
from nanochat_ray.storage import Store, absolute
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import hardware, identity, loop, memory, observers, validation
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.feed import from_shards
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.samples import sampler
from nanochat_ray.train.step import Batch

CHECKED_BYTES = 512 << 20
"""Shards up to this size together are checked before a job starts, larger ones when opened."""
Resume = Literal["auto", "never", "must"]


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
    tensorboard: str = ""
    """Folder on rank 0's machine for TensorBoard's files; empty writes none."""
    wandb: str = ""
    """Project at Weights & Biases that the run is shown in; empty is none."""
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Ray Train's workers have a working directory of their own.
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("dataset", self.dataset)
        check_name("run", self.run)
        if self.parent:
            check_name("parent", self.parent)

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
    check_name("dataset", name)
    root = Store.at(storage)
    dataset = root.child("datasets", name)
    if not dataset.exists("manifest.json"):
        have = root.list("datasets")
        raise ValueError(f"dataset={name!r} is not in {storage}; prepared there: {have or 'none'}")
    manifest = Manifest.load(dataset)
    folder = root.child("tokenizers", manifest.tokenizer[:16])
    tokenizer = Tokenizer.load(folder, manifest.tokenizer)
    return dataset, manifest, tokenizer


def check_resume(storage: str, run: str, resume: Resume) -> None:
    """ValueError if the run exists (``never``) or does not (``must``); ``auto`` takes either."""
    name = checkpoint.latest(Store.at(storage).child("runs", run))
    if resume == "never" and name is not None:
        raise ValueError(
            f"resume='never', but run {run!r} exists in {storage} (at {name}): choose another "
            "name, or resume it with auto or must"
        )
    if resume == "must" and name is None:
        raise ValueError(f"resume='must', but run {run!r} has no checkpoint in {storage}")


def check(job: TrainJob) -> TrainJob:
    """Refuses what cannot train, before any worker starts. Raises ValueError.

    Returns the job with the identity of its data and parent in ``about``: all its workers, however
    often they start, go by that.
    """
    observers.check(wandb=job.wandb)
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
    root = Store.at(job.storage)
    run = root.child("runs", job.run)
    about = {**job.about, **identity.describe(root, job.dataset, manifest, job.parent)}
    name = checkpoint.latest(run)
    if name is not None:
        identity.check_resumable(
            run,
            name,
            model=job.model,
            train=job.train,
            tokenizer=tokenizer.fingerprint,
            about=about,
        )
    if job.model.sequence_len < manifest.sequence_len:
        raise ValueError(
            f"sequence_len={job.model.sequence_len} is shorter than the rows of dataset "
            f"{job.dataset!r}, {manifest.sequence_len}"
        )
    parent_checkpoint = about.get("parent_checkpoint")
    if job.parent and parent_checkpoint is None and name is None:
        raise ValueError(f"parent={job.parent!r} has no checkpoint in {job.storage}")
    if parent_checkpoint is not None:
        saved = checkpoint.load_config(root.child("runs", job.parent), parent_checkpoint)
        if saved.tokenizer != tokenizer.fingerprint:
            raise ValueError(
                f"parent={job.parent!r} was trained with another tokenizer than dataset "
                f"{job.dataset!r}"
            )
    # A damaged shard is better found now than by a worker in the middle of a run.
    SequenceReader(dataset, manifest, "val").check(CHECKED_BYTES)
    SequenceReader(dataset, manifest, "train").check(CHECKED_BYTES)
    return replace(job, about=about)


def execute(
    job: TrainJob,
    *,
    rank: int = 0,
    world: int = 1,
    sharing: int = 1,
    device: torch.device | None = None,
    batches: Callable[[int], Iterator[Batch]] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
    should_save: Callable[[], bool] | None = None,
    may_publish: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains to the end, resuming what was begun; collective over the process group if any.

    ``sharing`` is the number of workers on this machine. ``batches`` replaces the plain reading
    of shards (Ray Data does); ``may_publish`` is that of ``loop.Run``. Returns the last metrics.
    Raises DoesNotFitError, on every rank, if one has too little memory.
    """
    device = device or torch.device("cpu")
    config = job.train
    check_memory(job, world=world, sharing=sharing, device=device)
    if config.deterministic:
        make_deterministic()
    if config.global_batch_size < world:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} is not allowed: {world} workers or more"
        )
    dataset, manifest, tokenizer = open_dataset(job.storage, job.dataset)
    root = Store.at(job.storage)
    model = GPT(job.model, compute_dtype=DTYPES[config.precision]).to(device)
    if job.parent:
        name = job.about.get("parent_checkpoint")
        saved = checkpoint.load(root.child("runs", job.parent), name, optimizer=False)
        model.load_state_dict(saved.weights)
    else:
        model.init_weights(torch.Generator().manual_seed(config.seed))
    if config.fp8:
        model.use_fp8()
    if config.compile:
        model.compile_hidden()
    if batches is None:
        batches = from_shards(SequenceReader(dataset, manifest, "train"), config, rank, world)
    about = job.about
    if "dataset_digest" not in about:
        about = about | identity.describe(root, job.dataset, manifest, job.parent)
    evaluate, bytes_per_token = validator(job, dataset, manifest, tokenizer, rank, world)
    found = hardware.detect(device)
    with observers.watching(job, rank) as observe:

        def tell(record: dict[str, Any]) -> None:
            observe(record)
            report(record)

        return loop.run(
            model,
            loop.Run(
                config=config,
                store=root.child("runs", job.run),
                tokenizer=tokenizer,
                batches=batches,
                evaluate=evaluate,
                sample=sampler(tokenizer, config.stage, config.sample_tokens)
                if config.sample_tokens
                else None,
                report=tell,
                should_stop=should_stop,
                should_save=should_save,
                about=about,
                ranks=Ranks(device),
                may_publish=may_publish,
                hardware=hardware.describe(device, config.precision),
                peak_flops=world * found.peak(config.precision) if found else 0.0,
                bytes_per_token=bytes_per_token,
            ),
        )


def check_memory(job: TrainJob, *, world: int, sharing: int, device: torch.device) -> None:
    """DoesNotFitError, on every rank alike, if the run needs more memory than a rank has free."""
    free = torch.tensor(float(machine.free_memory(device, sharing)), dtype=torch.float64)
    if world > 1:
        free = free.to(device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
    memory.refuse(
        job.model, job.train, world=world, on_gpu=device.type == "cuda", free=int(free.item())
    )


def make_deterministic() -> None:
    """Only deterministic operations from here on, in this process.

    On a CPU they all are for a fixed number of threads; on a GPU this costs speed. Must come
    before the first product on a GPU, where cuBLAS reads its workspace's size.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def validator(
    job: TrainJob, dataset: Store, manifest: Manifest, tokenizer: Tokenizer, rank: int, world: int
) -> tuple[Callable[[GPT], dict[str, float]], float]:
    """Validation on the first ``eval_sequences`` rows of the "val" split, shared by the ranks.

    Also gives the bytes of a token there, special ones left out; 0 for fine-tuning.
    """
    reader = SequenceReader(dataset, manifest, "val")
    rows = np.arange(min(job.train.eval_sequences, len(reader)), dtype=np.int64)
    lengths = tokenizer.byte_lengths()
    ids, mask = reader.read(rows)
    sizes = lengths[ids]
    bytes_per_token = float(sizes.sum() / max(1, (sizes > 0).sum())) if mask is None else 0.0
    ids, mask = reader.read(np.array_split(rows, world)[rank])

    def evaluate(model: GPT) -> dict[str, float]:
        micro = job.train.micro_batch_size
        if mask is None:
            return {
                "bits_per_byte": validation.bits_per_byte(
                    model, ids, lengths, micro_batch_size=micro
                )
            }
        return {"val_loss": validation.masked_loss(model, ids, mask, micro_batch_size=micro)}

    return evaluate, bytes_per_token
