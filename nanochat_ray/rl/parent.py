"""The run that RL starts from: its tokenizer, its weights, and what a checkpoint says of both."""

from __future__ import annotations

from typing import Any

import torch

from nanochat_ray import config as configs
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import require
from nanochat_ray.data.manifest import Manifest
from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.storage import Store
from nanochat_ray.tasks.registry import make_tasks
from nanochat_ray.tasks.task import content_digest
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import identity
from nanochat_ray.train.config import TrainerConfig

REHEARSAL = 3.0
"""Default weight of the conversations' log-likelihood beside the policy gradient."""


def tokenizer_run(config: TrainerConfig) -> Store:
    """The run, or its parent where it has not begun."""
    runs = Store.at(config.storage).child("runs")
    run = runs.child(config.run)
    return run if checkpoint.latest(run) else runs.child(config.parent)


def load_tokenizer(config: TrainerConfig) -> Tokenizer:
    return checkpoint.load_tokenizer(tokenizer_run(config))


def load_reference(config: TrainerConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """The parent, whose weights the policy started from, without gradients."""
    run, name = Store.at(config.storage).child("runs", config.parent), "parent_checkpoint"
    return checkpoint.load_model(run, config.about.get(name), device=device, dtype=dtype)[0]


def conversations_of(run: Store) -> str:
    """The conversations that ``run``, or what it learned from by RL, was fine-tuned on; "" if no
    checkpoint names them."""
    trainer = checkpoint.load_trainer(run)
    about, stage = trainer.get("about", {}), trainer.get("train_config", {}).get("stage")
    if stage == "rl":
        return str(about.get(identity.STAGE_CONFIG, {}).get("rehearsal_dataset") or "")
    return str(about.get("dataset", "")) if stage == "sft" else ""


def describe_rehearsal(
    root: Store, run: Store, tokenizer: Tokenizer, weight: float | None
) -> dict[str, Any]:
    """``rehearsal`` (the weight), ``rehearsal_dataset`` and ``rehearsal_digest`` of a new run that
    starts from ``run``; each None where there is none.

    ``weight`` None is the default. ValueError if there is no such dataset for another one.
    """
    keys = ("rehearsal", "rehearsal_dataset", "rehearsal_digest")
    if weight == 0:
        return dict.fromkeys(keys)
    name = conversations_of(run)
    manifest = None
    if name and (dataset := root.child("datasets", name)).exists("manifest.json"):
        manifest = Manifest.load(dataset)
    if manifest is not None and manifest.tokenizer == tokenizer.fingerprint:
        return dict(zip(keys, (weight or REHEARSAL, name, manifest.digest), strict=True))
    reason = "0: the storage has no conversations that the parent was fine-tuned on"
    require(weight is None, "rehearsal", weight, f"{reason} ({name!r})" if name else reason)
    return dict.fromkeys(keys)


def describe(config: TrainerConfig, rl: RLConfig) -> dict[str, Any]:
    """What a checkpoint's ``about`` holds of an RL run: its questions and what it rehearses by
    content, its parent, and its configuration. ValueError if there is nothing to rehearse."""
    root = Store.at(config.storage)
    tasks = make_tasks(rl.tasks, "train", rl.pool, config.train.seed)
    talk = describe_rehearsal(root, tokenizer_run(config), load_tokenizer(config), rl.rehearsal)
    return {
        "dataset": "questions",
        "dataset_digest": content_digest(tasks),
        **identity.describe_parent(root, config.parent),
        identity.STAGE_CONFIG: configs.to_json(rl) | talk,
    }
