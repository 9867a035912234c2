"""Conversations of the parent's fine-tuning, trained on beside the answers of each step.

Rewards come from a few tasks; what else the model knows drifts with them. The likelihood of some of
the conversations that it was fine-tuned on, as a second term of the loss, keeps that in place: its
gradient is near zero while they are known (PPO-ptx, Ouyang et al., arXiv 2203.02155).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import require
from nanochat_ray.data.order import global_batch_indices
from nanochat_ray.data.shards import Manifest, SequenceReader
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import identity

REHEARSAL = 1.0
"""Default weight of the conversations' log-likelihood beside the policy gradient."""
SEQUENCES_PER_STEP = 2
"""Packed sequences of a step, each of some twenty short conversations."""


class Conversation(NamedTuple):
    """``ids`` with BOS, up to the last trained token, and the ``indices`` of the trained ones."""

    ids: np.ndarray
    indices: np.ndarray


def split_conversations(
    ids: np.ndarray, mask: np.ndarray, bos: int, max_len: int
) -> list[Conversation]:
    """The conversations of packed sequences ``ids [n, T + 1]`` with the loss ``mask``, each cut to
    its first ``max_len`` tokens; those without a trained token, such as padding, are left out."""
    conversations = []
    for sequence, sequence_mask in zip(ids, mask, strict=True):
        starts = np.flatnonzero(sequence == bos)
        for part, part_mask in zip(
            np.split(sequence, starts), np.split(sequence_mask, starts), strict=True
        ):
            indices = np.flatnonzero(part_mask[:max_len])
            if len(indices):
                conversations.append(Conversation(part[: indices[-1] + 1], indices))
    return conversations


def dataset_name(run: Store) -> str:
    """The conversations that ``run``, or what it learned from by RL, was fine-tuned on; "" if no
    checkpoint names them."""
    trainer = checkpoint.load_trainer(run)
    about, stage = trainer.get("about", {}), trainer.get("train_config", {}).get("stage")
    if stage == "rl":
        return str(about.get(identity.STAGE_CONFIG, {}).get("rehearsal_dataset") or "")
    return str(about.get("dataset", "")) if stage == "sft" else ""


def describe(root: Store, run: Store, tokenizer: Tokenizer, weight: float | None) -> dict[str, Any]:
    """``rehearsal`` (the weight), ``rehearsal_dataset`` and ``rehearsal_digest`` of a new run that
    starts from ``run``; each None where there is none.

    ``weight`` None is the default. ValueError if there is no such dataset for another one.
    """
    keys = ("rehearsal", "rehearsal_dataset", "rehearsal_digest")
    if weight == 0:
        return dict.fromkeys(keys)
    name = dataset_name(run)
    manifest = None
    if name and (dataset := root.child("datasets", name)).exists("manifest.json"):
        manifest = Manifest.load(dataset)
    if manifest is not None and manifest.tokenizer == tokenizer.fingerprint:
        return dict(zip(keys, (weight or REHEARSAL, name, manifest.digest), strict=True))
    reason = "0: the storage has no conversations that the parent was fine-tuned on"
    require(weight is None, "rehearsal", weight, f"{reason} ({name!r})" if name else reason)
    return dict.fromkeys(keys)


class Rehearsal:
    """The conversations of each step: a function of (dataset, seed, step)."""

    def __init__(self, reader: SequenceReader, *, seed: int, bos: int, max_len: int):
        self.reader, self.seed, self.bos, self.max_len = reader, seed, bos, max_len

    @classmethod
    def open(cls, root: Store, name: str, tokenizer: Tokenizer, *, seed: int, max_len: int) -> Self:
        """Of the dataset ``name``; conversations are cut to ``max_len`` tokens."""
        dataset = root.child("datasets", name)
        reader = SequenceReader(dataset, Manifest.load(dataset), "train")
        return cls(reader, seed=seed, bos=tokenizer.bos, max_len=max_len)

    def conversations(self, step: int) -> list[Conversation]:
        sequences = global_batch_indices(len(self.reader), self.seed, SEQUENCES_PER_STEP, step)
        ids, mask = self.reader.read(sequences)
        assert mask is not None
        return split_conversations(ids, mask, self.bos, self.max_len)
