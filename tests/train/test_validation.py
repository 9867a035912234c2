"""What a run validates on, and its figures."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from nanochat_ray.data.shards import SequenceReader, write_shard
from nanochat_ray.storage import Store
from nanochat_ray.train.validation import Validator, bits_per_byte, masked_loss
from tests.tiny import TOKENIZER, write_dataset
from tests.train.test_step import CONFIG, random_model


def validator(root: Store, kind: str, *ranks: int, **fields: Any) -> Validator:
    manifest = write_dataset(root, kind, kind)
    config = dataclasses.replace(CONFIG, **fields)
    return Validator(config, root.child("datasets", kind), manifest, TOKENIZER, *ranks)


@pytest.mark.parametrize(("kind", "name"), [("base", "bits_per_byte"), ("sft", "val_loss")])
@pytest.mark.parametrize(("eval_sequences", "count"), [(5, 5), (99, 8)])
def test_the_first_sequences_are_evaluated(
    root: Store, kind: str, name: str, eval_sequences: int, count: int
) -> None:
    each = validator(root, kind, eval_sequences=eval_sequences, micro_batch_size=2)
    manifest = write_dataset(root, kind, kind)
    ids, mask = SequenceReader(root.child("datasets", kind), manifest, "val").read(np.arange(count))
    model = random_model().eval()
    if mask is None:
        value = bits_per_byte(model, ids, TOKENIZER.byte_lengths(), micro_batch_size=8)
    else:
        value = masked_loss(model, ids, mask, micro_batch_size=8)
    assert each.evaluate(model) == {name: pytest.approx(value, rel=1e-6)}


def test_ranks_share_the_sequences(root: Store) -> None:
    shares = [validator(root, "sft", rank, 3, eval_sequences=7) for rank in range(3)]
    whole = validator(root, "sft", eval_sequences=7)
    assert [len(share.ids) for share in shares] == [3, 2, 2]
    assert np.array_equal(np.concatenate([share.ids for share in shares]), whole.ids)


def test_bytes_of_one_token(root: Store) -> None:
    store = root.child("datasets", "one")
    ids = np.array([[TOKENIZER.bos, 65]], dtype=np.uint16)
    shard = write_shard(store, "val-0.arrow", ids, None)
    manifest = dataclasses.replace(
        write_dataset(root, "base"), sequence_len=1, splits={"train": [], "val": [shard]}
    )
    assert Validator(CONFIG, store, manifest, TOKENIZER).bytes_per_token == 1.0


def test_bytes_per_token_leave_special_tokens_out(root: Store) -> None:
    """Every token of the split but BOS has one byte."""
    each = validator(root, "base")
    assert (each.ids == TOKENIZER.bos).any()
    assert each.bytes_per_token == 1.0
    assert validator(root, "sft").bytes_per_token == 0.0
