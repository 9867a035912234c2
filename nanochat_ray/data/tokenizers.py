"""The tokenizers of a storage root: one folder each, named by the tokenizer's fingerprint.

``tokenizers/by-input`` maps the input that a tokenizer was trained on to its folder, so that equal
text trains no second one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from nanochat_ray.data import tokenizer_sample
from nanochat_ray.data.progress import log
from nanochat_ray.data.publish import key_of
from nanochat_ray.data.sources import ReadOptions, Unit
from nanochat_ray.data.split import SplitRule
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import FOLDER, Tokenizer, folder_of

_BY_INPUT = "by-input"


def names(root: Store) -> list[str]:
    """The folders of all tokenizers."""
    return [name for name in root.list(FOLDER) if name != _BY_INPUT]


def load(root: Store, name: str) -> Tokenizer:
    """The tokenizer of the folder ``name``. ValueError if it is damaged or another one."""
    folder = folder_of(root, name)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint[:16] != name:
        raise ValueError(
            f"{folder.uri}/tokenizer.json is damaged or another tokenizer: its fingerprint is "
            f"{tokenizer.fingerprint[:16]}"
        )
    return tokenizer


def save(root: Store, tokenizer: Tokenizer) -> None:
    tokenizer.save(folder_of(root, tokenizer.fingerprint))


def is_intact(root: Store, fingerprint: str) -> bool:
    """Whether the tokenizer of a dataset can be loaded; logs why if not."""
    try:
        Tokenizer.load(folder_of(root, fingerprint), fingerprint)
    except ValueError as error:
        log(f"WARNING: {error}; it is trained again")
        return False
    return True


def train_or_load(
    root: Store,
    identity: Any,
    plan: Sequence[Unit],
    rule: SplitRule,
    options: ReadOptions,
    vocab_size: int,
) -> Tokenizer:
    """Trains a tokenizer on a sample of the text, or loads that of an equal sample.

    ``identity`` is JSON values of which the text is a function.
    """
    sample_chars = tokenizer_sample.SAMPLE_CHARS
    key = key_of("tokenizer", identity, rule.to_json(), vocab_size, sample_chars)[:16]
    by_input = root.child(FOLDER, _BY_INPUT)
    if by_input.exists(key):
        try:
            tokenizer = load(root, by_input.read_text(key))
        except ValueError as error:
            log(f"WARNING: {error}; it is trained again")
        else:
            log(f"tokenizer: {tokenizer.vocab_size:,} tokens (trained before)")
            return tokenizer
    start = time.perf_counter()
    sample = tokenizer_sample.tokenizer_sample(plan, rule, options)
    tokenizer = Tokenizer.train(sample, vocab_size)
    save(root, tokenizer)
    by_input.write_text(key, tokenizer.fingerprint[:16])
    log(f"tokenizer: {tokenizer.vocab_size:,} tokens, {time.perf_counter() - start:.1f} s")
    return tokenizer
