"""What makes a run one run: all that shapes its steps is compared when it is resumed.

The model, the configuration of training with its optimizer, the tokenizer, the dataset by content
and the parent's weights by content must be what they were. ``RESUMABLE_FIELDS`` lists what may
change. A checkpoint keeps its side in config.json and, as ``about`` and ``train_config``, in
trainer.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nanochat_ray import config as configs
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import short_repr
from nanochat_ray.data.shards import Manifest
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig

RESUMABLE_FIELDS = {
    "micro_batch_size": "how a batch is split; its gradient is the same sum",
    "eval_every": "when it is measured",
    "eval_sequences": "on how much it is measured",
    "save_every": "when it is saved",
    "keep_latest_k": "which checkpoints stay",
    "keep_best": "which checkpoints stay",
    "save_timeout_s": "how long storage may fail",
    "checkpoint_activations": "memory against time",
    "compile": "time against another order of rounding",
    "deterministic": "time against equal bits",
    "sample_tokens": "texts for a person to read",
    "eval_questions": "on how much it is measured",
    "eval_samples": "on how much it is measured",
    "max_logprob_diff": "when the run fails",
    "grade_threads": "how many grades are given at once",
}
"""Fields of TrainConfig, and of a stage's own configuration, that may change when a run is resumed,
and why they do not shape its steps.

So may what no checkpoint holds: workers, min_workers, threads, Ray or not, print_every, tensorboard
and wandb.
"""
STAGE_CONFIG = "stage_config"
"""Field of ``about``: a stage's own configuration as JSON, whose fields are compared too."""
FLAGS = {
    "n_layer": "--depth",
    "steps": "--tokens, --tokens-per-param or --epochs",
    "global_batch_size": "--batch-tokens",
    "matrix_lr": "--depth, --batch-tokens or --lr-scale",
}
"""Fields that no flag of their name sets: what they follow from."""
_DIGEST = 16
"""Digits of a digest that a message shows."""
_MAX_LISTED = 5
"""Fields that a message lists."""


def describe(root: Store, dataset: str, manifest: Manifest, parent: str) -> dict[str, str]:
    """The identity of the data and of the parent, as a checkpoint's ``about`` keeps it.

    A parent without a checkpoint (any more) has neither ``parent_checkpoint`` nor
    ``parent_digest``.
    """
    return {
        "dataset": dataset,
        "dataset_digest": manifest.digest,
        **describe_parent(root, parent),
    }


def describe_parent(root: Store, parent: str) -> dict[str, str]:
    """The parent's part of ``describe``."""
    about = {"parent": parent}
    if parent:
        run = root.child("runs", parent)
        if (name := checkpoint.latest(run)) is not None:
            about["parent_checkpoint"] = name
            about["parent_digest"] = checkpoint.weights_digest(run, name)
    return about


def check_resumable(
    run: Store,
    name: str,
    *,
    model: ModelConfig,
    train: TrainConfig,
    tokenizer: str,
    about: Mapping[str, Any],
) -> list[str]:
    """Compares a checkpoint of ``run`` with what is to be trained now.

    ``tokenizer`` is a fingerprint, ``about`` what ``describe`` gave. Raises ValueError, naming
    the first fields that differ and both values of each. Returns one line for each thing that could
    not be compared, since an older program did not write it down.
    """
    config, trainer = checkpoint.load_config(run, name), checkpoint.load_trainer(run, name)
    where = f"run {run.root.rpartition('/')[2]!r}"
    if "train_config" not in trainer:
        raise ValueError(
            f"{where} was not trained here but imported ({name}): it has no optimizer state to "
            "resume from; train another run from its weights"
        )
    before = trainer["train_config"]
    if not isinstance(before, dict):
        raise ValueError(f"checkpoint {run.child(name).uri}: trainer.json has no train_config")
    old_about = trainer.get("about")
    old_about = old_about if isinstance(old_about, dict) else {}
    # What a user gave comes first: the size of RL's batch follows from its configuration.
    pairs = [*_fields(old_about.get(STAGE_CONFIG, {}), about.get(STAGE_CONFIG, {}), {})]
    pairs += _fields(configs.to_json(config.model), configs.to_json(model), {})
    pairs += _fields(before, configs.to_json(train), _defaults())
    _compare_fields(where, pairs)
    if config.tokenizer != tokenizer:
        old, new = config.tokenizer[:_DIGEST], tokenizer[:_DIGEST]
        raise ValueError(_refusal(where, ("tokenizer", old, new)))
    return list(_compare_about(where, old_about, about))


def _compare_fields(where: str, pairs: Iterable[tuple[str, Any, Any]]) -> None:
    differing = []
    for field, old, new in pairs:
        # JSON has lists where a configuration has tuples.
        old, new = (list(v) if isinstance(v, tuple) else v for v in (old, new))
        if field not in RESUMABLE_FIELDS and old != new:
            differing.append((field, old, new))
    if differing:
        raise ValueError(_refusal(where, *differing))


def _refusal(where: str, *differing: tuple[str, object, object]) -> str:
    """``differing``: (field, old value, new value), at least one."""
    (field, old, new), *others = differing
    source = f" (from {FLAGS[field]})" if field in FLAGS else ""
    entries = [f"{name}={short_repr(b)} ({short_repr(a)})" for name, a, b in others[:_MAX_LISTED]]
    if len(others) > _MAX_LISTED:
        entries.append(f"{len(others) - _MAX_LISTED} more")
    rest = f", and neither {'is' if len(others) == 1 else 'are'} {', '.join(entries)}"
    return (
        f"{field}={short_repr(new)}{source} is not what this run was started with "
        f"({short_repr(old)}){rest if others else ''}: give {where} the same "
        f"value{'s' if others else ''}, or train another run"
    )


def _defaults() -> dict[str, Any]:
    return configs.to_json(TrainConfig(steps=1, global_batch_size=1, micro_batch_size=1))


def _fields(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(name, old value, new value) of each field, those of the optimizer among them.

    A field that is younger than the checkpoint had its default then; one that this program does not
    have is None.
    """
    for name, value in new.items():
        before = old.get(name, defaults.get(name))
        if isinstance(value, Mapping):
            inner = before if isinstance(before, Mapping) else {}
            yield from _fields(inner, value, configs.to_json(OptimConfig()))
        else:
            yield name, before, value
    # Of another program: options that this one lacks.
    for name in sorted(old.keys() - new.keys()):
        yield name, old[name], None


def _compare_about(where: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Data and parent: by content where both sides know it, else by name."""
    for kind in ("dataset", "parent"):
        then, now = old.get(kind), new.get(kind, "")
        digest, digest_now = old.get(f"{kind}_digest"), new.get(f"{kind}_digest")
        if then is None:
            yield f"{where}: its checkpoint does not name its {kind}: {kind}={now!r} not compared"
        elif digest and digest_now:
            if digest != digest_now:
                before = _describe_content(then, old.get(f"{kind}_checkpoint"), digest)
                after = _describe_content(now, new.get(f"{kind}_checkpoint"), digest_now)
                raise ValueError(
                    f"{kind}={now!r} ({after}) is not what this run was started with ({before}): "
                    f"give {where} the same content, or train another run"
                )
        elif then != now:
            raise ValueError(_refusal(where, (kind, then, now)))
        elif now:
            side = "its checkpoint does not say what was in" if not digest else "there is no more"
            yield f"{where}: {side} {kind} {now!r}: content not compared"


def _describe_content(name: str, checkpoint: str | None, digest: str) -> str:
    at = f"{name!r} at {checkpoint}" if checkpoint else f"{name!r}"
    return f"{at}, content {digest[:_DIGEST]}"
