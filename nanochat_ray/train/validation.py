"""Validation: bits per byte, a loss that does not depend on the tokenizer, and masked loss."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from nanochat_ray.data.shards import Manifest, SequenceReader
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train.config import TrainConfig


class Validator:
    """Evaluates a model on the first ``eval_sequences`` of the validation split.

    The ranks share the sequences; each gets the result over all of them.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Store,
        manifest: Manifest,
        tokenizer: Tokenizer,
        rank: int = 0,
        world: int = 1,
    ):
        reader = SequenceReader(dataset, manifest, "val")
        sequences = np.arange(min(config.eval_sequences, len(reader)), dtype=np.int64)
        self.byte_lengths = tokenizer.byte_lengths()
        self.micro_batch_size = config.micro_batch_size
        ids, mask = reader.read(sequences)
        sizes = self.byte_lengths[ids]
        self.bytes_per_token = 0.0
        """Bytes of a token of the split, without special tokens; 0 for fine-tuning."""
        if mask is None:
            self.bytes_per_token = float(sizes.sum() / max(1, (sizes > 0).sum()))
        self.ids, self.mask = reader.read(np.array_split(sequences, world)[rank])

    def evaluate(self, model: GPT) -> dict[str, float]:
        """``{"bits_per_byte": …}`` for a base model, ``{"val_loss": …}`` for fine-tuning.

        Collective.
        """
        micro = self.micro_batch_size
        if self.mask is None:
            bits = bits_per_byte(model, self.ids, self.byte_lengths, micro_batch_size=micro)
            return {"bits_per_byte": bits}
        return {"val_loss": masked_loss(model, self.ids, self.mask, micro_batch_size=micro)}


def bits_per_byte(
    model: GPT, ids: np.ndarray, byte_lengths: np.ndarray, *, micro_batch_size: int
) -> float:
    """Bits the model needs per byte of the text in ``ids [n, T + 1]``.

    ``byte_lengths [vocab_size]`` holds the bytes of each token, 0 for special tokens, which are
    not counted. Every rank passes its own sequences and gets the result over all of them.
    """
    nats, count = _sum_losses(model, ids, byte_lengths[ids[:, 1:]], micro_batch_size)
    return nats / (math.log(2) * max(count, 1))


def masked_loss(model: GPT, ids: np.ndarray, mask: np.ndarray, *, micro_batch_size: int) -> float:
    """Mean nats over the tokens of ``ids [n, T + 1]`` that ``mask`` marks, over all ranks."""
    nats, count = _sum_losses(model, ids, mask[:, 1:], micro_batch_size)
    return nats / max(count, 1)


@torch.no_grad()
def _sum_losses(
    model: GPT, ids: np.ndarray, sizes: np.ndarray, micro_batch_size: int
) -> tuple[float, float]:
    """Nats of the targets in ``ids [n, T + 1]`` whose ``sizes [n, T]`` are not 0, and the sum of
    these, over the process group, if there is one. Collective."""
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(ids), micro_batch_size):
        part = slice(start, start + micro_batch_size)
        sequences = torch.from_numpy(ids[part].astype(np.int64)).to(device)
        size = torch.from_numpy(sizes[part].astype(np.int64)).to(device)
        targets = sequences[:, 1:].masked_fill(size == 0, -1)
        totals[0] += model.loss(sequences[:, :-1].contiguous(), targets, reduction="sum").double()
        totals[1] += size.sum()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    nats, size_sum = totals.tolist()
    return nats, size_sum
