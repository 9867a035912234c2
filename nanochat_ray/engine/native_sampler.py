"""Sampling in C (``csrc/sampling.c``): one pass over each row of logits, rows in parallel.

Penalties, bias, bans, masks, distances to the likeliest token, ties and noise are bitwise those of
``sampler`` and of ``SamplingState`` with torch. Exponentials and the order of their sums are not: a
token can differ only where the random number, or the edge of a nucleus, falls within that rounding.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.engine.slot_parameters import SlotParameters

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
SCRATCH_ROWS, SCRATCH_MULTIPLE = 3, 16
"""Scratch of a thread: rows of V floats, padded to this multiple; as in ``csrc/sampling.c``."""

_COLUMNS = (
    *("features", "top_k", "seed", "ban_before", "top_p", "temperature", "min_p"),
    *("penalties", "counts", "bias", "in_text", "bans"),
)


class _SamplingTable(ctypes.Structure):
    """Pointers to the columns of ``SlotParameters``, in the order of ``csrc/sampling.c``."""

    _fields_ = tuple((name, _POINTER) for name in _COLUMNS)


class NativeSampler:
    """Samples with the parameters of one ``SlotParameters``. Not thread-safe."""

    def __init__(self, library: ctypes.CDLL, parameters: SlotParameters):
        self._sample = library.sample
        self._sample.restype = None
        self._sample.argtypes = [
            *(_POINTER, _INT, _INT, _INT, _POINTER),
            *(_POINTER,) * 5,
            *(_INT, _POINTER, _INT, _POINTER, ctypes.c_int),
        ]
        self._parameters = parameters
        self._table = _SamplingTable()
        self._scratch = torch.empty(0)
        self.bind()

    def bind(self) -> None:
        """Reads the addresses of the parameters, after a table has been allocated."""
        for name in _COLUMNS:
            column = getattr(self._parameters, name)
            setattr(self._table, name, None if column is None else column.data_ptr())

    def choose(
        self,
        logits: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        grammar_masks: tuple[Sequence[int], np.ndarray] | None = None,
        uncounted_tokens: Tensor | None = None,
    ) -> Tensor:
        """As ``SamplingState.choose``; ``uncounted_tokens`` int64 ``[A, 2]``."""
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        S, V = logits.shape
        slots_and_positions = np.array((slots, positions), dtype=np.int64)
        tokens = torch.empty(S, dtype=torch.int64)
        mask_rows, masks = None, None
        if grammar_masks is not None:
            mask_rows, masks = np.full(S, -1), np.ascontiguousarray(grammar_masks[1])
            mask_rows[list(grammar_masks[0])] = np.arange(len(masks))
        threads = torch.get_num_threads()
        width = -(-V // SCRATCH_MULTIPLE) * SCRATCH_MULTIPLE
        if self._scratch.numel() < threads * SCRATCH_ROWS * width:
            self._scratch = torch.empty(threads * SCRATCH_ROWS * width)
        num_uncounted = 0 if uncounted_tokens is None else len(uncounted_tokens)
        self._sample(
            *(logits.data_ptr(), logits.stride(0), S, V, ctypes.addressof(self._table)),
            *(slots_and_positions[0].ctypes.data, slots_and_positions[1].ctypes.data),
            *(None if array is None else array.ctypes.data for array in (mask_rows, masks)),
            None if uncounted_tokens is None else uncounted_tokens.data_ptr(),
            *(num_uncounted, self._scratch.data_ptr(), width, tokens.data_ptr(), threads),
        )
        return tokens
