"""What a process takes of its GPU or its machine: memory, threads, a compiler for kernels."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import mmap
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from nanochat_ray import container

HUGE_PAGE = 2 << 20
MOST_THREADS = 8
"""An estimate, measured on 2 cores only: small operations do not scale to many threads."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
P = ParamSpec("P")
T = TypeVar("T")


def free_memory(device: torch.device, sharing: int = 1, gpu_share: float = 1.0) -> int:
    """Bytes that a process may use of its GPU, or its share of this machine or container.

    ``sharing``: the number of processes that share this machine's memory. ``gpu_share``: the share
    of its GPU, of which it may have some already, for processes that share one.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # Memory that torch has cached but does not use is free for its tensors.
        allocation = torch.cuda.memory_allocated(device)
        free += torch.cuda.memory_reserved(device) - allocation
        return max(0, min(int(free), int(gpu_share * total) - allocation))
    return container.free_memory() // max(1, sharing)


def zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, now: bool = True
) -> torch.Tensor:
    """``torch.zeros``, on a CPU in huge pages of 2 MiB if the system has them.

    ``now``: all pages are allocated now, not one by one at their first use.

    Address translation of 4 KiB pages takes as long as reading them. With huge pages a sum over
    64 MiB took half the time, an engine's matmuls 0.8 to 0.9 of it (engine/BENCHMARKS.md).
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size < HUGE_PAGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system may have no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
    return tensor.zero_() if now else tensor


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same values on ``device``, without waiting for earlier work on a GPU; later work on the
    current stream sees them."""
    if device.type != "cuda":
        return values.to(device)
    # From pageable memory CUDA would wait. Torch keeps pinned memory until it has been read.
    return values.pin_memory().to(device, non_blocking=True)


def use_expandable_segments() -> None:
    """Lets the memory that torch takes from a GPU grow in place, so that micro-batches of several
    sizes do not fragment it. To be called before the first allocation; what the user has set for
    the allocator stays."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in this machine's memory. From a GPU it goes to page-locked memory and is valid from
    ``finish_copies`` on: several copies follow each other without a pause."""
    if tensor.device.type != "cuda":
        return tensor.detach().clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor.detach(), non_blocking=True)


def finish_copies(device: torch.device) -> None:
    """Waits for the copies of ``copy_to_host``."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def engine_threads(sharing: int) -> int:
    """Torch threads for each of ``sharing`` engines on this machine's cores.

    One core is left to all else: the threads wait for each other at every operation, and with as
    many as cores another busy process made an engine seven times slower than one thread is
    (2 cores, 2026-11-21).
    """
    return max(1, min(MOST_THREADS, (container.cores() - 1) // sharing))


def run_in_temporary_thread(make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``make(...)``, without threads of OpenMP or freed memory left behind.

    Each thread that computes gets a team of its own, which lives as long as it does. As soon as
    all teams together are larger than the machine, OpenMP has them sleep between any two
    operations: what only loads a model must not leave one. Its copies of the weights were freed,
    but the C library would keep their memory.
    """
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(make, *args, **kwargs).result()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    return result


def check_triton_toolchain() -> None:
    """ValueError unless there is what Triton compiles the launchers of its kernels with: a C
    compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    compiler = compiler or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacking = ["a C compiler (cc, gcc or clang; or CC)"] * (not compiler)
    lacking += [f"Python's headers ({header})"] * (not header.exists())
    if lacking:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        raise ValueError(
            f"training on a GPU needs {' and '.join(lacking)}, with which Triton compiles: on "
            f"Debian or Ubuntu, apt install gcc {version}-dev"
        )


def use_triton(device: torch.device) -> bool:
    """Whether this project's Triton kernels run: CUDA builds of torch bring Triton along."""
    return device.type == "cuda" and HAS_TRITON
