"""The order of training: which rows make up the global batch of a step, as a pure function.

Rows are globally shuffled when they are written, so the first pass takes them as they lie, which
reads shards front to back. Every later pass is a permutation of its own, computed row by row (a
Feistel network with cycle walking), so it costs no memory however large the dataset is.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 4


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood, 2014) on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream(*numbers: int) -> int:
    """A key of 64 bits for a place such as (seed, epoch); other places, unrelated keys."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = mix((key ^ np.uint64(number % 2**64)) + np.uint64(0x9E3779B97F4A7C15))
    return int(key[0])


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a permutation of ``range(size)``, chosen by ``key``, sends each of ``index`` (int64).

    A balanced Feistel network is a bijection on 2^(2h) numbers; numbers that land outside the
    range go through it again until they are inside, which keeps it a bijection on the range.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) + np.uint64(key % 2**64))
    out = index.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        x = out[todo]
        left, right = x >> half, x & low
        for k in keys:
            left, right = right, left ^ (mix(right + k) & low)
        out[todo] = (left << half) | right
        todo[todo] = out[todo] >= size
    return out.astype(np.int64)


def global_batch_size(num_rows: int, seed: int, batch: int, step: int) -> np.ndarray:
    """Row numbers, int64 ``[batch]``, of the global batch of ``step`` (from 0).

    Depends on nothing else: not on the number of workers, nor on where a run was stopped.
    """
    if num_rows < 1:
        raise ValueError("the dataset has no rows")
    position = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epoch, index = position // num_rows, position % num_rows
    for e in np.unique(epoch):
        if e > 0:
            chosen = epoch == e
            index[chosen] = permute(index[chosen], num_rows, stream(seed, int(e)))
    return index
