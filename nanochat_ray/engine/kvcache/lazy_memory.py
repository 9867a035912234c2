"""Zeroed memory of a CPU that the system commits page by page, when it is first written."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch

from nanochat_ray.machine import HUGE_PAGE

GIB = 1 << 30
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Address space may be larger than the memory. (Python names the flag from 3.13 on.)"""
MADV_POPULATE_WRITE = 23
"""Commits pages without changing what they hold (Linux 5.14; ``man 2 madvise``)."""


class LazyMemory:
    """Address space for a tensor, as large as it may ever be needed.

    A page that nobody has written reads as zeros and takes no memory. Addresses never change.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, huge_pages: bool):
        """``huge_pages``: pages of 2 MiB, if the system has them. Address translation is faster,
        but the first token of a region commits 2 MiB of it. ValueError if there is no such address
        space."""
        num_bytes = math.prod(shape) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        try:
            self._map = mmap.mmap(-1, max(1, num_bytes), flags=flags)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"keys and values: {num_bytes / GIB:.1f} GiB of address space are not available "
                f"({error}); lower max_num_seqs, max_model_len or prefix_cache_tokens"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system may have no huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        count = math.prod(shape)
        self.tensor = torch.frombuffer(self._map, dtype=dtype, count=count).view(tuple(shape))

    def commit(self, start: int, num_bytes: int) -> threading.Thread:
        """Commits ``[start, start + num_bytes)`` in a thread of its own, which it returns, so that
        who writes there later does not wait for the system. Without effect on systems other than
        Linux 5.14 and later.
        """
        thread = threading.Thread(target=self._commit, args=(start, num_bytes), daemon=True)
        thread.start()
        return thread

    def _commit(self, start: int, num_bytes: int) -> None:
        # Not mmap.madvise, which keeps the interpreter's lock. One call would also keep the lock of
        # the address space, which allocations of other threads need.
        if sys.platform != "linux":
            return
        madvise, address = ctypes.CDLL(None).madvise, self.tensor.data_ptr()
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        last = min(start + num_bytes, len(self._map))
        for page in range(start // HUGE_PAGE * HUGE_PAGE, last, HUGE_PAGE):
            if madvise(address + page, min(HUGE_PAGE, last - page), MADV_POPULATE_WRITE):
                return

    def release(self, start: int, num_bytes: int) -> None:
        """Gives back the pages within ``[start, start + num_bytes)``, whose contents are lost."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def page_tokens(bytes_per_head: int, huge_pages: bool) -> int:
    """Tokens that one page holds, of one head with ``bytes_per_head`` for each."""
    return max(1, (HUGE_PAGE if huge_pages else mmap.PAGESIZE) // bytes_per_head)
