"""Attention of decoding rows on a CPU, in C: ``decode_attention.c``, compiled where it runs.

A decoding row reads all its keys and values for one query: the memory's speed is what counts. One
pass that fetches ahead is 1.2 to 1.5 times as fast as torch's attention (NOTES.md), takes each row
at its own length, and does not mind which slots are in the batch. Where there is no C compiler, the
engine goes on with torch's.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
LANES = 16
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILE_SECONDS = 60
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class DecodeAttention:
    """For heads of ``head_dim`` floats of which ``group`` share keys and values."""

    def __init__(self, head_dim: int, group: int, library: ctypes.CDLL):
        self._scale, self._group, self._function = head_dim**-0.5, group, library.step_attention
        self._function.restype = None
        self._function.argtypes = [
            *(_POINTER, _INT) * 3,
            *(_POINTER,) * 5,
            *(_INT,) * 5,
            ctypes.c_float,
            ctypes.c_int,
        ]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
        decodes: int,
        window: int,
    ) -> Tensor:
        """Writes ``k`` and ``v [N, Hkv, D]`` to ``keys`` and ``values [slots, Hkv, length, D]``.

        Returns ``[N, H, D]``, of which the first ``decodes`` rows are the attention of ``q
        [N, H, D]`` and the others undefined. ``places`` int64 ``[2, N']`` are slots and positions
        of the first N' rows, the decodes first; rows behind them are padding. All else is float32.
        """
        q, k, v = (x if x.stride()[1:] == (x.size(2), 1) else x.contiguous() for x in (q, k, v))
        y = torch.empty(q.shape)
        self._function(
            *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
            *(keys.data_ptr(), values.data_ptr(), places[0].data_ptr(), places[1].data_ptr()),
            *(y.data_ptr(), decodes, places.size(1), keys.size(1), keys.size(2)),
            *(window, self._scale, torch.get_num_threads()),
        )
        return y


@functools.cache
def decode_attention(head_dim: int, group: int) -> DecodeAttention | None:
    """None where it cannot be compiled, and says why."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None or head_dim % LANES:
        missing = (
            f"heads of {head_dim}, no multiple of {LANES}" if compiler else "no C compiler (cc)"
        )
        logger.info("attention of decodes is torch's: %s", missing)
        return None
    sizes = (f"-DHEAD={head_dim}", f"-DGROUP={group}")
    # torch has loaded OpenMP already. So it is one pool of threads; and who has it not does alone.
    reasons = []
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "decode_attention.so"
        for parallel in (("-fopenmp",), ()):
            command = [compiler, *OPTIONS, *parallel, *sizes, str(SOURCE), "-o", str(made), "-lm"]
            try:
                subprocess.run(
                    command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS
                )
                return DecodeAttention(head_dim, group, ctypes.CDLL(str(made)))
            except subprocess.CalledProcessError as error:
                reasons.append(error.stderr.strip())
            except (OSError, subprocess.TimeoutExpired) as error:
                reasons.append(str(error))
    logger.warning("attention of decodes is torch's: %s", "; ".join(reasons))
    return None
