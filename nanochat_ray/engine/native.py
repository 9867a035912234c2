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

import numpy as np
import torch
from torch import Tensor

PANEL_WIDTH, K_BLOCK, MAX_PASS_ROWS = 32, 64, 128
"""Outputs of a weight panel, the multiple that its inputs are padded to, and the rows that are
converted for one pass over the panels: as in ``csrc/``."""
SCRATCH_BYTES = 6
"""Of each element of x in its converted form, at most."""
WEIGHT_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
"""By the dtype of the packed weight, as in ``csrc/weight_formats.h``."""
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
        self._attention = library.slot_attention
        self._attention.argtypes = [
            *(_POINTER, _INT) * 3,
            *(_POINTER,) * 6,
            *(_INT,) * 5,
            *(ctypes.c_int, ctypes.c_float, ctypes.c_int),
        ]
        self._linear = library.linear
        self._linear.argtypes = [ctypes.c_int, *(_POINTER,) * 4, *(_INT,) * 3, ctypes.c_int]
        self.amx = bool(library.amx_available())
        """Matmuls use Intel's AMX."""
        library.isa_name.restype = ctypes.c_char_p
        self.level: str = "amx" if self.amx else library.isa_name().decode()
        """The instructions in use: amx, avx512, avx2, avx, sse2, neon or generic."""
        self._rotary_qk_norm = library.rotary_qk_norm
        self._rotary_qk_norm.argtypes = [
            *(_POINTER, _INT, _POINTER, _POINTER, _INT, _INT),
            *(ctypes.c_float, ctypes.c_int),
        ]
        self._rms_norm = library.rms_norm
        self._rms_norm.argtypes = [_POINTER, _POINTER, _INT, _INT, ctypes.c_float, ctypes.c_int]
        self._relu_squared = library.relu_squared
        self._relu_squared.argtypes = [_POINTER, _INT, ctypes.c_int]
        self._softcap = library.softcap
        self._softcap.argtypes = [_POINTER, _INT, ctypes.c_float, ctypes.c_int]
        self._sigmoid = library.sigmoid
        self._sigmoid.argtypes = [_POINTER, _INT]
        rowwise = (self._rotary_qk_norm, self._rms_norm, self._relu_squared, self._sigmoid)
        for function in (self._attention, self._linear, *rowwise, self._softcap):
            function.restype = None

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
        q, k, v = (x if x.stride()[1:] == (x.size(2), 1) else x.contiguous() for x in (q, k, v))
        y = torch.empty(q.shape)
        self._attention(
            *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
            *(keys.data_ptr(), values.data_ptr()),
            *(slot_mapping[0].data_ptr(), slot_mapping[1].data_ptr()),
            *(tile_starts.data_ptr(), y.data_ptr(), tile_starts.size(0) - 1, q.size(0)),
            *(keys.size(1), keys.size(2), window, keys.dtype == torch.bfloat16),
            *(self.attention_scale, torch.get_num_threads()),
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
        threads, weight_format = torch.get_num_threads(), WEIGHT_FORMATS[panels.dtype]
        scratch = torch.empty(threads * self.scratch_size(N, K, panels.dtype), dtype=torch.uint8)
        pointers = (x.data_ptr(), panels.data_ptr(), y.data_ptr(), scratch.data_ptr())
        self._linear(weight_format, *pointers, N, K, count, threads)
        return y

    def scratch_size(self, N: int, K: int, dtype: torch.dtype) -> int:
        """Bytes that a thread needs to convert ``x [N, K]`` for a weight of this dtype; if 0, the
        scratch is a null pointer."""
        if not self.amx and dtype == torch.float32:
            return 0
        return -(-K // K_BLOCK) * K_BLOCK * min(-(-N // 16) * 16, MAX_PASS_ROWS) * SCRATCH_BYTES

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, (N, C) = torch.empty_like(x), x.shape
        self._rms_norm(x.data_ptr(), y.data_ptr(), N, C, eps, torch.get_num_threads())
        return y

    def rotary_qk_norm(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        """In place; the elements of a token must be next to each other."""
        N, H, D = x.shape
        assert x.stride()[1:] == (D, 1)
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        pointers = (x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr())
        self._rotary_qk_norm(*pointers, N, H, eps, torch.get_num_threads())
        return x

    def relu_squared(self, x: Tensor) -> Tensor:
        """In place."""
        assert x.is_contiguous()
        self._relu_squared(x.data_ptr(), x.numel(), torch.get_num_threads())
        return x

    def sigmoid(self, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        self._sigmoid(x.data_ptr(), x.numel())
        return x

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """In place if ``logits`` is contiguous."""
        if not cap:
            return logits
        logits = logits.contiguous()
        self._softcap(logits.data_ptr(), logits.numel(), cap, torch.get_num_threads())
        return logits
