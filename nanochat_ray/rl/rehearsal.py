"""Conversations of the parent's fine-tuning, trained on beside the answers of each step.

Rewards come from a few tasks; what else the model knows drifts with them. The likelihood of some of
the conversations that it was fine-tuned on, as a second term of the loss, keeps that in place: its
gradient is near zero while they are known (PPO-ptx, Ouyang et al., arXiv 2203.02155).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from nanochat_ray.data.order import global_batch_indices
from nanochat_ray.data.packing import Conversation, unpack_conversations
from nanochat_ray.data.shards import Manifest, SequenceReader
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import identity
from nanochat_ray.train.config import TrainerConfig

SEQUENCES_PER_STEP = 2
"""Packed sequences of a step, each of some twenty short conversations."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The conversations of each step: a function of (dataset, seed, step)."""

    reader: SequenceReader | None
    """None: there are none."""
    weight: float
    seed: int
    bos: int
    max_len: int
    """Conversations are cut to this many tokens."""

    @classmethod
    def open(cls, config: TrainerConfig, tokenizer: Tokenizer) -> Self:
        """What ``parent.describe`` has found for the run."""
        about, reader = config.about[identity.STAGE_CONFIG], None
        if name := about["rehearsal_dataset"]:
            dataset = Store.at(config.storage).child("datasets", name)
            reader = SequenceReader(dataset, Manifest.load(dataset), "train")
        return cls(
            reader=reader,
            weight=about["rehearsal"] or 0.0,
            seed=config.train.seed,
            bos=tokenizer.bos,
            max_len=config.model.sequence_len + 1,
        )

    def conversations(self, step: int) -> list[Conversation]:
        if self.reader is None:
            return []
        sequences = global_batch_indices(len(self.reader), self.seed, SEQUENCES_PER_STEP, step)
        ids, mask = self.reader.read(sequences)
        assert mask is not None
        return unpack_conversations(ids, mask, self.bos, self.max_len)
