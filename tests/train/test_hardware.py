"""Cards by the names that their drivers report."""

from __future__ import annotations

import psutil
import pytest
import torch

from nanochat_ray.model.config import Precision
from nanochat_ray.train import plan, recipe
from nanochat_ray.train.hardware import HARDWARE, Hardware, describe, from_driver


def card(name: str, memory: int = 40 << 30) -> Hardware:
    return from_driver(name, memory=memory, multiprocessors=132, clock_khz=1_980_000)


@pytest.mark.parametrize(
    ("name", "key", "teraflops"),
    [
        ("NVIDIA L4", "l4", 121),
        ("NVIDIA L40", "l40", 181),
        ("NVIDIA L40S", "l40s", 362),
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H100 PCIe", "h100-pcie", 756),
        ("NVIDIA H100 NVL", "h100-nvl", 835),
        ("NVIDIA H200", "h200", 989),
        ("NVIDIA GH200 480GB", "gh200", 989),
        ("NVIDIA A100-SXM4-40GB", "a100-40", 312),
        ("NVIDIA A100-SXM4-80GB", "a100", 312),
        ("NVIDIA A100 80GB PCIe", "a100", 312),
        ("NVIDIA B200", "b200", 2250),
        ("NVIDIA GeForce RTX 4090", "rtx4090", 165.2),
    ],
)
def test_cards_are_told_apart(name: str, key: str, teraflops: float) -> None:
    entry = card(name)
    assert entry.name == key
    assert entry.peak("bf16") == teraflops * 1e12
    assert entry.memory == 40 << 30  # what the driver reports, not the data sheet


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H20",
        "NVIDIA RTX 6000 Ada Generation",
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_no_peak_is_guessed(name: str, precision: Precision) -> None:
    entry = card(name, memory=10 << 30)
    assert entry.peak(precision) == 0
    assert (entry.name, entry.memory) == (name.removeprefix("NVIDIA "), 10 << 30)
    assert entry.source == "132 multiprocessors at 1.98 GHz, not in the table"


def test_plan_of_an_unknown_card() -> None:
    model = recipe.model_config(12, 32_768)
    train = recipe.base_plan(model).train
    entry = card("NVIDIA H20", memory=96 << 30)
    plan_fields = plan.describe(model, train, workers=1, hardware=entry)
    assert plan_fields["hours"] is None
    text = plan.render(plan_fields)
    assert "time      not known on 1 × H20, at a speed that is not known" in text
    assert " of 96 GiB on each worker" in text


def test_every_card_has_a_driver_name() -> None:
    cards = [entry for entry in HARDWARE.values() if entry.is_gpu]
    assert len(cards) == len(HARDWARE) - 1
    assert card("NVIDIA L4").source == HARDWARE["l4"].source


# Dense TFLOP/s in bf16 and (without TF32) fp32, and GB of memory, from the vendor's data sheets.
DATA_SHEETS = {
    "b200": (2250, 75, 180),
    "gh200": (989, 67, 96),
    "h200": (989, 67, 141),
    "h200-nvl": (835, 60, 141),
    "h100": (989, 67, 80),
    "h100-nvl": (835, 60, 94),
    "h100-pcie": (756, 51, 80),
    "a100": (312, 19.5, 80),
    "a100-40": (312, 19.5, 40),
    "l40s": (362, 91.6, 48),
    "l40": (181, 90.5, 48),
    "l4": (121, 30.3, 24),
    "rtx4090": (165.2, 82.6, 24),
}


def test_peaks_are_those_of_data_sheets() -> None:
    cards = {name: entry for name, entry in HARDWARE.items() if entry.is_gpu}
    assert cards.keys() == DATA_SHEETS.keys()
    for name, (bf16, fp32, memory) in DATA_SHEETS.items():
        entry = cards[name]
        peaks = (entry.peak("bf16") / 1e12, entry.peak("fp32") / 1e12)
        assert peaks == pytest.approx((bf16, fp32))
        assert (entry.memory, entry.mfu) == (memory * 10**9, 0.4)
    cpu = HARDWARE["cpu"]
    assert (cpu.bf16, cpu.fp32, cpu.memory, cpu.mfu) == (1.45e12, 1.7e11, 0, 0.1)


def test_a_report_describes_the_machine() -> None:
    values = describe(torch.device("cpu"), "fp32")
    assert values["device"] == "CPU"
    assert values["peak of a worker"].startswith("0.17 TFLOP/s in fp32 (torch 2.13 matmul of")
    total = psutil.virtual_memory().total / 2**30
    assert values["memory"] == f"{total:.0f} GiB"
