"""A source of batches: all that differs between the stages of training.

Pre-training and fine-tuning read a prepared dataset (``DatasetSource``); reinforcement learning
samples its batches from the model itself (``rl/source.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from nanochat_ray.data.shards import SequenceReader
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import identity
from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.data_loader import DataLoader, ShardDataLoader, open_dataset
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.samples import make_sampler
from nanochat_ray.train.step import CrossEntropy, Objective
from nanochat_ray.train.validation import Validator

SAMPLE_SEQUENCES = 16
"""Of the validation split: the first ones, in which the prompts of samples are looked for."""


class Source(DataLoader, Protocol):
    """The batches of one rank, what is minimised on them, and how the model is validated."""

    objective: Objective
    on_policy: bool
    """Batches depend on the weights of their step: they are not prefetched."""
    tokenizer: Tokenizer
    """From ``setup`` on."""
    bytes_per_token: float
    """Bytes of a token of the validation split; 0 where a loss has no bits per byte. From
    ``setup`` on."""

    def setup(self, model: GPT, ranks: Ranks) -> None:
        """Called once before all other methods, collectively."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What the batches depend on beside the configuration, for a checkpoint's ``about``."""
        ...

    def evaluate(self, model: GPT) -> dict[str, float]:
        """One of ``metrics.VAL_METRICS``, and further figures. Collective."""
        ...

    def samples(self, model: GPT) -> list[dict[str, Any]]:
        """Texts for a person to read: at least ``prompt`` and ``text``. Called on rank 0."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON values that the batches of later steps depend on, for a checkpoint."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues behind the step at which ``state`` returned this."""
        ...


class DatasetSource:
    """The sequences of a prepared dataset, in the deterministic data order."""

    on_policy = False

    def __init__(self, config: TrainerConfig, data_loader: DataLoader | None = None):
        """``data_loader`` replaces the plain reading of shards (Ray Data does)."""
        self.config, self.data_loader = config, data_loader
        self.objective: Objective = CrossEntropy()

    def setup(self, model: GPT, ranks: Ranks) -> None:
        config, train, rank, world = self.config, self.config.train, ranks.rank, ranks.world
        dataset, self.manifest, self.tokenizer = open_dataset(config.storage, config.dataset)
        if self.data_loader is None:
            reader = SequenceReader(dataset, self.manifest, "train")
            self.data_loader = ShardDataLoader(reader, train, rank, world)
        self.validator = Validator(train, dataset, self.manifest, self.tokenizer, rank, world)
        self.bytes_per_token = self.validator.bytes_per_token
        reader = SequenceReader(dataset, self.manifest, "val")
        ids, mask = reader.read(np.arange(min(SAMPLE_SEQUENCES, len(reader))))
        self.sampler = make_sampler(self.tokenizer, ids, mask, train.sample_tokens)

    def identity(self) -> Mapping[str, Any]:
        config, root = self.config, Store.at(self.config.storage)
        return identity.describe(root, config.dataset, self.manifest, config.parent)

    def batches(self, start: int) -> Iterator[Any]:
        assert self.data_loader is not None
        return self.data_loader.batches(start)

    def evaluate(self, model: GPT) -> dict[str, float]:
        return self.validator.evaluate(model)

    def samples(self, model: GPT) -> list[dict[str, Any]]:
        if not self.config.train.sample_tokens:
            return []
        return [{"prompt": prompt, "text": text} for prompt, text in self.sampler(model)]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        return
