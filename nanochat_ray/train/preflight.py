"""All that is refused before a run: a configuration, its data, its workers, their memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from nanochat_ray import machine
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import require
from nanochat_ray.data.shards import Manifest, SequenceReader
from nanochat_ray.model import fp8
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import identity, loggers, memory
from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.data_loader import open_dataset

VERIFY_BYTES = 512 << 20
"""Shards up to this size together are verified before a run, larger ones when they are opened."""
Resume = Literal["auto", "never", "must"]


def check(config: TrainerConfig, *, on_gpu: bool = False) -> TrainerConfig:
    """Refuses what cannot train, before any worker starts. Raises ValueError.

    ``on_gpu``: the workers will have GPUs, which this machine need not have. Returns
    the configuration with the identity of its data and parent in ``about``: every worker, however
    often it restarts, uses that.
    """
    loggers.check_installed(wandb=config.wandb)
    dataset, manifest, tokenizer = open_dataset(config.storage, config.dataset)
    _check_dataset(config, manifest, tokenizer)
    about = identity.describe(Store.at(config.storage), config.dataset, manifest, config.parent)
    if config.model.sequence_len < manifest.sequence_len:
        raise ValueError(
            f"sequence_len={config.model.sequence_len} is shorter than the sequences of dataset "
            f"{config.dataset!r}, {manifest.sequence_len}"
        )
    if on_gpu:
        _check_shapes(config, manifest.sequence_len)
    config = check_run(config, tokenizer, about)
    # Before the run, so that no worker finds a damaged shard in the middle of it.
    SequenceReader(dataset, manifest, "val").check(VERIFY_BYTES)
    SequenceReader(dataset, manifest, "train").check(VERIFY_BYTES)
    return config


def check_run(
    config: TrainerConfig, tokenizer: Tokenizer, about: Mapping[str, Any]
) -> TrainerConfig:
    """The configuration with ``about`` added to its own. ValueError if the run's checkpoint, or
    its parent, does not fit it."""
    about = {**config.about, **about}
    root = Store.at(config.storage)
    run = root.child("runs", config.run)
    name = checkpoint.latest(run)
    if name is not None:
        identity.check_resumable(
            run,
            name,
            model=config.model,
            train=config.train,
            tokenizer=tokenizer.fingerprint,
            about=about,
        )
    if config.parent:
        parent_checkpoint = about.get("parent_checkpoint")
        if parent_checkpoint is not None:
            _check_parent(config, root, parent_checkpoint, tokenizer)
        elif name is None:
            raise ValueError(f"parent={config.parent!r} has no checkpoint in {config.storage}")
    return replace(config, about=about)


def _check_dataset(config: TrainerConfig, manifest: Manifest, tokenizer: Tokenizer) -> None:
    if manifest.kind != config.train.stage:
        raise ValueError(
            f"dataset={config.dataset!r} was prepared for stage {manifest.kind}, "
            f"not for {config.train.stage}"
        )
    if config.model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={config.model.vocab_size} does not fit dataset {config.dataset!r}, whose "
            f"tokenizer has {tokenizer.vocab_size} tokens"
        )


def _check_parent(config: TrainerConfig, root: Store, name: str, tokenizer: Tokenizer) -> None:
    """ValueError unless the parent was trained with the dataset's tokenizer."""
    parent = checkpoint.load_config(root.child("runs", config.parent), name)
    if parent.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"parent={config.parent!r} was trained with another tokenizer than "
            + (f"dataset {config.dataset!r}" if config.dataset else f"run {config.run!r}")
        )


def _check_shapes(config: TrainerConfig, sequence_len: int) -> None:
    """ValueError for shapes that the kernels of a GPU cannot take."""
    model, train = config.model, config.train
    require(
        train.precision != "bf16" or model.head_dim % 8 == 0,
        "n_head",
        model.n_head,
        f"n_embd={model.n_embd} over n_head must be a multiple of 8 in bf16 on a GPU",
    )
    # Of any number of sequences: the last micro-batch of a worker may be a smaller one.
    require(
        not train.fp8 or sequence_len % fp8.MULTIPLE == 0,
        "fp8",
        train.fp8,
        f"only with sequences of a multiple of {fp8.MULTIPLE} tokens; those of dataset "
        f"{config.dataset!r} have {sequence_len}",
    )


def check_device(config: TrainerConfig, device: torch.device) -> None:
    """ValueError if this worker's device cannot run the configuration."""
    train = config.train
    if device.type != "cuda":
        require(not train.fp8, "fp8", train.fp8, "only on a GPU")
        return
    capability = torch.cuda.get_device_capability(device)
    require(
        not train.fp8 or capability >= (8, 9),
        "fp8",
        train.fp8,
        f"compute capability 8.9 or higher, and {torch.cuda.get_device_name(device)} has "
        f"{capability[0]}.{capability[1]}",
    )
    machine.check_triton_toolchain()


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


def check_workers(config: TrainerConfig, workers: int, min_workers: int = 0) -> None:
    """ValueError if the run cannot be shared by that many workers."""
    rule = f"from 0 to workers={workers}"
    require(0 <= min_workers <= workers, "min_workers", min_workers, rule)
    size = config.train.global_batch_size
    rule = f"at most global_batch_size={size}, or a worker would have no sequences"
    require(workers <= size, "workers", workers, rule)


def check_memory(config: TrainerConfig, *, local_world_size: int, device: torch.device) -> None:
    """DoesNotFitError, on every rank alike, if the run needs more memory than a rank has free.

    Collective. ``local_world_size`` is the number of workers on this machine.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    free = torch.tensor(float(machine.free_memory(device, local_world_size)), dtype=torch.float64)
    if world > 1:
        free = free.to(device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
    memory.check_memory(
        config.model,
        config.train,
        world=world,
        on_gpu=device.type == "cuda",
        free=int(free.item()),
    )
