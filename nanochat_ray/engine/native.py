"""What an engine's forward waits for on a CPU: ``native.c`` and ``linear.c``, called from torch.

A decoding row reads all its keys and values for one query: the memory's speed is what counts. One
pass that fetches ahead is 1.2 to 1.5 times as fast as torch's attention (NOTES.md), takes each row
at its own length, and does not mind which slots are in the batch. None of torch's matrix products
has a row's result hang on that row alone; ours do, and go by Intel's AMX where there is some, with
float32's precision. What is done to each element goes over memory once and not six times.
``kernels.py`` compiles them; where that cannot be done, the engine computes with torch's.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

COLUMNS, CHUNK, SHARED_ROWS = 32, 64, 128
"""Outputs of a block of weights, what its inputs are rounded up to, and the rows that AMX takes at
a time, as in ``linear.c``."""
FLOAT_EPS = torch.finfo(torch.float32).eps
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Native:
    """For heads of ``head_dim`` floats of which ``group`` share keys and values."""

    def __init__(self, head_dim: int, tile: int, library: ctypes.CDLL):
        self._scale, self._tile = head_dim**-0.5, tile
        self._attention = library.step_attention
        self._attention.argtypes = [
            *(_POINTER, _INT) * 3,
            *(_POINTER,) * 6,
            *(_INT,) * 5,
            *(ctypes.c_float, ctypes.c_int),
        ]
        self._linear = library.linear
        self._linear.argtypes = [*(_POINTER,) * 4, *(_INT,) * 3, ctypes.c_int]
        self.amx = bool(library.has_tiles())
        """Products are made by Intel's AMX."""
        library.kernel_level.restype = ctypes.c_char_p
        self.level: str = "amx" if self.amx else library.kernel_level().decode()
        """The instructions in use: amx, avx512, avx2, avx, sse2, neon or generic."""
        self._turn = library.turn_and_norm
        self._turn.argtypes = [
            *(_POINTER, _INT, _POINTER, _POINTER, _INT, _INT),
            *(ctypes.c_float, ctypes.c_int),
        ]
        self._norm = library.rms_norm
        self._norm.argtypes = [_POINTER, _POINTER, _INT, _INT, ctypes.c_float, ctypes.c_int]
        self._relu = library.relu_squared
        self._relu.argtypes = [_POINTER, _INT, ctypes.c_int]
        self._softcap = library.softcap
        self._softcap.argtypes = [_POINTER, _INT, ctypes.c_float, ctypes.c_int]
        rowwise = (self._linear, self._turn, self._norm, self._relu, self._softcap)
        for function in (self._attention, *rowwise):
            function.restype = None

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
        tiles: Tensor,
        window: int,
    ) -> Tensor:
        """Writes ``k`` and ``v [N, Hkv, D]`` to ``keys`` and ``values [slots, Hkv, length, D]``.

        Returns the attention of ``q [N, H, D]``, as large, over what the slots then hold.
        ``places`` int64 ``[2, N]`` are slots and positions, ``tiles`` what ``tiles`` made of them,
        ``length`` is a multiple of 16;
        all else is float32.
        """
        q, k, v = (x if x.stride()[1:] == (x.size(2), 1) else x.contiguous() for x in (q, k, v))
        y = torch.empty(q.shape)
        self._attention(
            *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
            *(keys.data_ptr(), values.data_ptr(), places[0].data_ptr(), places[1].data_ptr()),
            *(tiles.data_ptr(), y.data_ptr(), tiles.size(0) - 1, q.size(0)),
            *(keys.size(1), keys.size(2), window, self._scale, torch.get_num_threads()),
        )
        return y

    def tiles(self, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """Borders, int64, between rows that read their keys together: neighbours of one sequence,
        some at a time."""
        rows = np.arange(len(slots))
        begins = np.ones(len(slots), dtype=bool)
        begins[1:] = (np.diff(slots) != 0) | (np.diff(positions) != 1)
        begins |= (rows - np.maximum.accumulate(rows * begins)) % self._tile == 0
        return torch.from_numpy(np.append(np.flatnonzero(begins), len(slots)))

    def linear(self, x: Tensor, blocks: Tensor) -> Tensor:
        """``x [..., K]`` times ``Product.blocks``: ``[..., N]``, all float32.

        A row's bits hang on that row alone."""
        x, K = x.contiguous(), x.size(-1)
        count, depth, width = blocks.shape
        rows = x.numel() // K
        y = torch.empty((*x.shape[:-1], count * width))
        threads = torch.get_num_threads()
        room = 3 * depth * min(-(-rows // 16) * 16, SHARED_ROWS) if self.amx else 0
        parts = torch.empty(threads * room, dtype=torch.int16)  # of no numbers: a null pointer
        pointers = (x.data_ptr(), blocks.data_ptr(), y.data_ptr(), parts.data_ptr())
        self._linear(*pointers, rows, K, count, threads)
        return y

    def turn_(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        """``rotate`` and ``rms_norm`` in place: ``x [B, T, H, D]``, ``cos`` and ``sin
        [B or 1, T, 1, D/2]``, float32."""
        B, T, H, D = x.shape
        assert x.stride()[2:] == (D, 1)
        assert B == 1 or T == 1 or x.stride(0) == T * x.stride(1)
        if cos.size(0) < B or not (cos.is_contiguous() and sin.is_contiguous()):
            cos, sin = (t.expand(B, T, 1, D // 2).contiguous() for t in (cos, sin))
        step = x.stride(0) if T == 1 else x.stride(1)
        pointers = (x.data_ptr(), step, cos.data_ptr(), sin.data_ptr())
        self._turn(*pointers, B * T, H, eps, torch.get_num_threads())
        return x

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """``model.fused.rms_norm`` of float32 ``[..., C]``."""
        x = x.contiguous()
        y, C = torch.empty_like(x), x.size(-1)
        self._norm(x.data_ptr(), y.data_ptr(), x.numel() // C, C, eps, torch.get_num_threads())
        return y

    def relu_squared_(self, x: Tensor) -> Tensor:
        """max(x, 0)² in place, of contiguous float32."""
        assert x.is_contiguous()
        self._relu(x.data_ptr(), x.numel(), torch.get_num_threads())
        return x

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """cap tanh(x / cap), in place where ``x`` is contiguous float32."""
        x = x.contiguous()
        self._softcap(x.data_ptr(), x.numel(), cap, torch.get_num_threads())
        return x


class Norm(nn.Module):
    """In place of ``model.layers.Norm``."""

    def __init__(self, native: Native, eps: float | None):
        super().__init__()
        self.native, self.eps = native, FLOAT_EPS if eps is None else eps

    def forward(self, x: Tensor) -> Tensor:
        return self.native.rms_norm(x, self.eps)


class Product(nn.Module):
    """In place of a ``model.layers.Linear`` with float32 ``weight [N, K]``."""

    def __init__(self, native: Native, weight: Tensor, memory: Tensor | None = None):
        """``memory`` holds ``room(weight)`` numbers."""
        super().__init__()
        self.native = native
        self.out_features, self.in_features = weight.shape
        padded = pad(weight, (0, -self.in_features % CHUNK, 0, -self.out_features % COLUMNS))
        blocks = padded.unflatten(0, (-1, COLUMNS)).transpose(1, 2)
        memory = torch.empty(blocks.numel()) if memory is None else memory
        self.blocks = memory.view(blocks.shape).copy_(blocks)

    @staticmethod
    def room(weight: Tensor) -> int:
        N, K = weight.shape
        return -(-N // COLUMNS) * COLUMNS * -(-K // CHUNK) * CHUNK

    def forward(self, x: Tensor) -> Tensor:
        y = self.native.linear(x, self.blocks)
        # Of a gate's few outputs it is a slice, which torch's sigmoid takes one by one: of a whole
        # tensor it takes 16 at a time, and those left over by another formula.
        return y if y.size(-1) == self.out_features else y[..., : self.out_features]


class Turn(nn.Module):
    """In place of ``model.layers.Turn``: takes what a product has just made, and changes it."""

    def __init__(self, native: Native):
        super().__init__()
        self.native = native

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], eps: float | None) -> Tensor:
        return self.native.turn_(x, *angles, FLOAT_EPS if eps is None else eps)


class ReluSquared(nn.Module):
    """In place of ``model.layers.ReluSquared``, likewise."""

    def __init__(self, native: Native):
        super().__init__()
        self.native = native

    def forward(self, x: Tensor) -> Tensor:
        return self.native.relu_squared_(x)


class Softcap(nn.Module):
    """In place of ``model.layers.Softcap``, likewise."""

    def __init__(self, native: Native, cap: float):
        super().__init__()
        self.native, self.cap = native, cap

    def forward(self, logits: Tensor) -> Tensor:
        return self.native.softcap(logits, self.cap) if self.cap else logits
