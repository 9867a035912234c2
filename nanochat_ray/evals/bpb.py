"""Bits per byte of any text: how well a model predicts it, whatever its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train.validation import bits_per_byte

BATCH = 8
"""Sequences of one forward pass."""


@dataclass(frozen=True)
class TextScore:
    bits_per_byte: float
    bytes: int
    tokens: int
    documents: int


def evaluate_text(
    model: GPT, tokenizer: Tokenizer, documents: Iterable[str], *, max_tokens: int = 0
) -> TextScore:
    """Bits per byte over the documents, each from its own beginning, in spans of the context.

    Every byte is predicted once. ``max_tokens`` stops after about that many; 0 takes all.
    Raises ValueError if there is no text.
    """
    lengths = tokenizer.byte_lengths()
    length = model.config.sequence_len + 1
    bits, size, tokens, count = 0.0, 0, 0, 0

    def spans() -> Iterator[np.ndarray]:
        nonlocal tokens, count
        for document in documents:
            ids = np.asarray([tokenizer.bos, *tokenizer.encode(document)], dtype=np.int64)
            count += 1
            for start in range(0, len(ids) - 1, length - 1):
                span = ids[start : start + length]
                tokens += len(span) - 1
                # Special tokens have no bytes, so what is filled up counts for nothing.
                yield np.pad(span, (0, length - len(span)), constant_values=tokenizer.bos)
                if 0 < max_tokens <= tokens:
                    return

    def add(spans_of_batch: list[np.ndarray]) -> None:
        nonlocal bits, size
        ids = np.stack(spans_of_batch)
        num_bytes = int(lengths[ids[:, 1:]].sum())
        bits += bits_per_byte(model, ids, lengths, micro_batch_size=BATCH) * num_bytes
        size += num_bytes

    batch: list[np.ndarray] = []
    for span in spans():
        batch.append(span)
        if len(batch) == BATCH:
            add(batch)
            batch = []
    if batch:
        add(batch)
    if not size:
        raise ValueError("text is empty: there is nothing to measure")
    return TextScore(bits / size, size, tokens, count)
