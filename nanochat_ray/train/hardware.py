"""What a worker computes on, and the peak FLOP/s that MFU is relative to.

Peaks are dense figures without sparsity, from the makers' data sheets; the CPU's was measured.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from nanochat_ray.model.config import Precision

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One worker's device. Rates are FLOP/s, memory is bytes (0: that of this machine)."""

    name: str
    bf16: float
    fp32: float
    memory: int
    mfu: float
    """Share of the peak that a plan counts on, where nothing was measured yet."""
    source: str

    def peak(self, precision: Precision) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


_NVIDIA_MFU = 0.40
"""nanochat's depth 12 reaches 0.41 of an H100's bf16 peak, its depth 24 more (July 2026)."""


def _gpu(name: str, bf16: float, fp32: float, memory: int, source: str) -> Hardware:
    return Hardware(
        name=name,
        bf16=bf16 * 1e12,
        fp32=fp32 * 1e12,
        memory=memory * 10**9,
        mfu=_NVIDIA_MFU,
        source=source,
    )


# fp32 is the rate without TF32, which torch leaves off unless it is asked for.
HARDWARE = {
    entry.name: entry
    for entry in (
        _gpu("b200", 2250, 75, 180, "NVIDIA HGX B200 data sheet"),
        _gpu("h200", 989, 67, 141, "NVIDIA H200 SXM data sheet"),
        _gpu("h100", 989, 67, 80, "NVIDIA H100 SXM data sheet"),
        _gpu("a100", 312, 19.5, 80, "NVIDIA A100 80 GB SXM data sheet"),
        _gpu("l40s", 362, 91.6, 48, "NVIDIA L40S data sheet"),
        _gpu("l4", 121, 30.3, 24, "NVIDIA L4 data sheet"),
        _gpu("rtx4090", 165.2, 82.6, 24, "NVIDIA Ada architecture white paper"),
        Hardware(
            name="cpu",
            bf16=1.45e12,
            fp32=1.7e11,
            memory=0,
            # 1.4e11 FLOP/s at depth 4, each of two workers. A run with --cpu-minutes measures.
            mfu=0.10,
            source="torch 2.13 matmul of 1,024³, one thread of a Xeon with AMX, measured",
        ),
    )
}


def by_name(name: str) -> Hardware:
    """Hardware by its name in the table. ValueError lists the names."""
    if name not in HARDWARE:
        raise ValueError(f"hardware={name!r} is not allowed: one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def detect(device: torch.device) -> Hardware | None:
    """The table's entry for a device; None for a GPU that is not in it, whose peak is unknown."""
    if device.type != "cuda":
        return HARDWARE["cpu"]
    name_of_device = torch.cuda.get_device_name(device).lower().replace(" ", "")
    # Longer names first, or an L40S would match an L4.
    for name in sorted(HARDWARE, key=len, reverse=True):
        if name in name_of_device:
            return HARDWARE[name]
    return None


def describe(device: torch.device, precision: Precision) -> dict[str, Any]:
    """The machine, as a run's report shows it."""
    entry = detect(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / GIB:.0f} GiB",
        "peak of a worker": f"{entry.peak(precision) / 1e12:,.4g} TFLOP/s in {precision} "
        f"({entry.source})"
        if entry
        else "not known",
    }
