"""The C kernels of the CPU hot path, called from torch: the sources in ``csrc/``.

Decoding is bound by memory bandwidth: each token reads all its keys and values for one query. One
pass that prefetches is 1.2 to 1.5 times as fast as torch's (BENCHMARKS.md), attends over each
sequence at its own length, and works with any slots in the batch. A row's result depends on that
row alone, which torch's matmuls do not guarantee. The matmuls use Intel's AMX when available, with
float32 precision. Elementwise operations read memory once instead of up to six times.

``kernels.py`` compiles them; where that is impossible the engine computes with torch.

Legend: N tokens, K input features, H heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.engine.plan_operations import (
    WEIGHT_FORMATS,
    Index,
    Kind,
    Operation,
    Step,
    operation,
)

PANEL_WIDTH, K_BLOCK, MAX_PASS_ROWS = 32, 64, 128
"""Outputs of a weight panel, the multiple that its inputs are padded to, and the rows that are
converted for one pass over the panels: as in ``csrc/``."""
SCRATCH_BYTES = 6
"""Of each element of x in its converted form, at most."""
FLOAT_EPS = torch.finfo(torch.float32).eps
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Native:
    """A compiled library, for one head size and one number of queries to a key/value head.

    Beside ``attention`` and ``linear`` it implements ``operators.Operators``.
    """

    def __init__(self, head_dim: int, tile_tokens: int, library: ctypes.CDLL):
        """``tile_tokens``: how many tokens of a sequence read their keys together, at most."""
        self.attention_scale, self._tile_tokens = head_dim**-0.5, tile_tokens
        self.library = library
        self.run_step = library.run_step
        """Of operations, their number and a ``Step``."""
        self.run_step.argtypes, self.run_step.restype = [_POINTER, _INT, _POINTER], None
        library.isa_name.restype = ctypes.c_char_p
        self.level: str = library.isa_name().decode()
        """The instructions in use: one of ``kernels.LEVELS``."""
        self.amx = self.level == "amx"
        """Matmuls use Intel's AMX."""

    def _run(self, one: Operation, rows: int, **fields: Any) -> None:
        step = Step(rows=rows, threads=torch.get_num_threads(), **fields)
        self.run_step(ctypes.addressof(one), 1, ctypes.addressof(step))

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        slot_mapping: Tensor,
        tile_starts: Tensor,
        window: int,
    ) -> Tensor:
        """Writes ``k`` and ``v [N, Hkv, D]`` to ``keys`` and ``values [slots, Hkv, length, D]``.

        Returns the attention ``[N, H, D]`` of ``q [N, H, D]`` over what the slots then contain.
        ``slot_mapping`` int64 ``[2, N]`` holds slots and positions, ``tile_starts`` is what
        ``tile_starts`` returns for them, ``length`` is a multiple of 16. ``keys`` and ``values``
        are float32 or bfloat16, all else is float32.
        """
        y, (slots, positions) = torch.empty(q.shape), slot_mapping
        qkv, H, D = torch.cat((q, k, v), dim=1), q.size(1), q.size(2)
        one = operation(
            Kind.ATTENTION,
            y,
            qkv,
            weight=keys,
            factor=values,
            width=H * D,
            count=keys.size(1),
            extra=window,
        )
        indices = [None] * len(Index)
        indices[Index.POSITIONS] = positions.data_ptr()
        self._run(
            one,
            q.size(0),
            indices=tuple(indices),
            slots=slots.data_ptr(),
            tile_starts=tile_starts.data_ptr(),
            tiles=tile_starts.size(0) - 1,
            kv_length=keys.size(2),
            attention_scale=self.attention_scale,
        )
        return y

    def tile_starts(self, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """int64 ``[tiles + 1]``: the first token of each tile, and N. A tile is a few neighbours of
        one sequence, which read their keys together."""
        tokens = np.arange(len(slots))
        starts = np.ones(len(slots), dtype=bool)
        starts[1:] = (np.diff(slots) != 0) | (np.diff(positions) != 1)
        starts |= (tokens - np.maximum.accumulate(tokens * starts)) % self._tile_tokens == 0
        return torch.from_numpy(np.append(np.flatnonzero(starts), len(slots)))

    def linear(self, x: Tensor, panels: Tensor) -> Tensor:
        """float32 ``x [N, K]`` times a weight of ``count`` panels, packed as ``PackedLinear`` does.

        Returns float32 ``[N, count * PANEL_WIDTH]``. A row depends bitwise on that row alone.
        """
        x = x.contiguous()
        (N, K), count = x.shape, panels.size(0)
        y = torch.empty((N, count * PANEL_WIDTH))
        size = torch.get_num_threads() * self.scratch_size(N, K, panels.dtype)
        scratch = torch.empty(size, dtype=torch.uint8)
        weight_format = WEIGHT_FORMATS[panels.dtype]
        one = operation(
            Kind.LINEAR, y, x, weight=panels, width=K, weight_format=weight_format, count=count
        )
        self._run(one, N, scratch=scratch.data_ptr())
        return y

    def scratch_size(self, N: int, K: int, dtype: torch.dtype) -> int:
        """Bytes that a thread needs to convert ``x [N, K]`` for a weight of this dtype; if 0, the
        scratch is a null pointer."""
        if not self.amx and dtype == torch.float32:
            return 0
        return -(-K // K_BLOCK) * K_BLOCK * min(-(-N // 16) * 16, MAX_PASS_ROWS) * SCRATCH_BYTES

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        self._run(operation(Kind.RMS_NORM, y, x, value=eps), x.size(0))
        return y

    def rotary_qk_norm(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        """In place; the elements of a token must be next to each other."""
        N, H, D = x.shape
        assert x.stride()[1:] == (D, 1)
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        self._run(operation(Kind.ROTARY, x, cos, weight=sin, count=H, value=eps), N)
        return x

    def relu_squared(self, x: Tensor) -> Tensor:
        """In place."""
        assert x.is_contiguous()
        self._run(operation(Kind.RELU_SQUARED, x, x), x.size(0))
        return x

    def sigmoid(self, x: Tensor) -> Tensor:
        gates, y = x.contiguous(), torch.ones(x.shape)
        N, H = x.shape
        self._run(operation(Kind.GATE, y, y, weight=gates, width=1, count=H), N)
        return y

    def softcap(self, logits: Tensor, cap: float, out: Tensor | None = None) -> Tensor:
        """In place if ``logits`` is contiguous and float32."""
        logits = logits.float()
        if cap:
            logits = logits.contiguous()
            self._run(operation(Kind.SOFTCAP, logits, logits, value=cap), logits.size(0))
        return logits if out is None else out.copy_(logits)
