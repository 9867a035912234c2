"""What a worker computes on, and the peak FLOP/s that MFU is relative to.

Peaks are dense figures without sparsity, from the makers' data sheets; the CPU's was measured.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from nanochat_ray.model.config import Precision

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One worker's device. Rates are FLOP/s (0: not known), memory is bytes (0: that of this
    machine)."""

    name: str
    bf16: float
    fp32: float
    memory: int
    mfu: float
    """Share of the peak that a plan counts on, where nothing was measured yet."""
    source: str
    is_gpu: bool = True

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
        _gpu("gh200", 989, 67, 96, "NVIDIA GH200 data sheet"),
        _gpu("h200", 989, 67, 141, "NVIDIA H200 SXM data sheet"),
        _gpu("h200-nvl", 835, 60, 141, "NVIDIA H200 NVL data sheet"),
        _gpu("h100", 989, 67, 80, "NVIDIA H100 SXM data sheet"),
        _gpu("h100-nvl", 835, 60, 94, "NVIDIA H100 NVL data sheet"),
        _gpu("h100-pcie", 756, 51, 80, "NVIDIA H100 PCIe data sheet"),
        _gpu("a100", 312, 19.5, 80, "NVIDIA A100 80 GB SXM data sheet"),
        _gpu("a100-40", 312, 19.5, 40, "NVIDIA A100 40 GB data sheet"),
        _gpu("l40s", 362, 91.6, 48, "NVIDIA L40S data sheet"),
        _gpu("l40", 181, 90.5, 48, "NVIDIA L40 data sheet"),
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
            is_gpu=False,
        ),
    )
}
_DRIVER_NAMES = {
    "b200": r"B200",
    "gh200": r"GH200 (120|480)GB",
    "h200": r"H200",
    "h200-nvl": r"H200 NVL",
    "h100": r"H100 80GB HBM3",
    "h100-nvl": r"H100 NVL",
    "h100-pcie": r"H100 PCIe",
    "a100": r"A100-(SXM4|PCIE)-80GB|A100 80GB PCIe",
    "a100-40": r"A100-(SXM4|PCIE)-40GB",
    "l40s": r"L40S",
    "l40": r"L40",
    "l4": r"L4",
    "rtx4090": r"GeForce RTX 4090",
}
"""What a driver calls a card, without "NVIDIA". The whole name must match: a slice of a card (MIG)
and the variants for laptops or export have other peaks."""


def by_name(name: str) -> Hardware:
    """Hardware by its name in the table. ValueError lists the names."""
    if name not in HARDWARE:
        raise ValueError(f"hardware={name!r} is not allowed: one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def from_driver(name: str, *, memory: int, multiprocessors: int, clock_khz: int) -> Hardware:
    """A GPU as its driver describes it; its peak is 0 if the card is not in the table.

    ``memory`` is in bytes. No peak is derived from ``multiprocessors`` and ``clock_khz``: the
    FLOPs of a tensor core in a cycle differ between cards of one architecture.
    """
    short_name = name.removeprefix("NVIDIA ").strip()
    for key, pattern in _DRIVER_NAMES.items():
        if re.fullmatch(pattern, short_name):
            return replace(HARDWARE[key], memory=memory)
    source = f"{multiprocessors} multiprocessors at {clock_khz / 1e6:.2f} GHz, not in the table"
    return Hardware(name=short_name, bf16=0, fp32=0, memory=memory, mfu=0, source=source)


def detect(device: torch.device) -> Hardware:
    """What ``device`` is: an entry of the table, with the memory that the driver reports."""
    if device.type != "cuda":
        return HARDWARE["cpu"]
    card = torch.cuda.get_device_properties(device)
    return from_driver(
        card.name,
        memory=card.total_memory,
        multiprocessors=card.multi_processor_count,
        clock_khz=getattr(card, "clock_rate", 0),
    )


def describe(device: torch.device, precision: Precision) -> dict[str, Any]:
    """The machine, as a run's report shows it."""
    entry = detect(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = entry.peak(precision)
    rate = f"{peak / 1e12:,.4g} TFLOP/s in {precision}" if peak else "not known"
    return {
        "device": name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "memory": f"{psutil.virtual_memory().total / GIB:.0f} GiB",
        "peak of a worker": f"{rate} ({entry.source})",
    }
