"""The order of training: which sequences form the global batch of a step, as a pure function.

The shards are globally shuffled when they are written, so the first epoch reads them from front to
back. Every later epoch is a permutation of its own, computed index by index (a Feistel network with
cycle walking), so it needs no memory however large the dataset is.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 4


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood, 2014) on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*numbers: int) -> int:
    """A key of 64 bits for numbers such as (seed, epoch); other numbers give unrelated keys."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = mix((key ^ np.uint64(number % 2**64)) + np.uint64(0x9E3779B97F4A7C15))
    return int(key[0])


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images of ``index`` (int64 ``[n]``) under the permutation of ``range(size)`` of ``key``.

    A balanced Feistel network is a bijection on 2^(2h) numbers; numbers that fall outside the
    range pass through it again until they are inside, which keeps it a bijection on the range.
    """
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    low_bits = np.uint64((1 << int(half)) - 1)
    round_keys = mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) + np.uint64(key % 2**64))
    out = index.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        x = out[outside]
        high, low = x >> half, x & low_bits
        for round_key in round_keys:
            high, low = low, high ^ (mix(low + round_key) & low_bits)
        out[outside] = (high << half) | low
        outside[outside] = out[outside] >= size
    return out.astype(np.int64)


def global_batch_indices(
    num_sequences: int, seed: int, global_batch_size: int, step: int
) -> np.ndarray:
    """Sequence indices, int64 ``[global_batch_size]``, of the global batch of ``step`` (from 0).

    Depends on nothing else: not on the number of workers, nor on the step at which a run resumed.
    """
    if num_sequences < 1:
        raise ValueError("the dataset has no sequences")
    first = step * global_batch_size
    position = np.arange(first, first + global_batch_size, dtype=np.int64)
    epoch, index = position // num_sequences, position % num_sequences
    for e in np.unique(epoch):
        if e > 0:
            mask = epoch == e
            index[mask] = permute(index[mask], num_sequences, derive_key(seed, int(e)))
    return index
