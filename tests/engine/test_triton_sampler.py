"""The sampling kernel chooses as ``sampler.choose`` does, row by row."""

from __future__ import annotations

import pytest
import torch

from nanochat_ray.engine import sampler

pytest.importorskip("triton")
from nanochat_ray.engine import triton_sampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = sampler.SAMPLED | sampler.TOP_K | sampler.TOP_P | sampler.MIN_P | sampler.NUCLEUS


def rows_of(values: list[tuple[float, int, float, float]]) -> sampler.Rows:
    """Of (temperature, top-k, top-p, min-p)."""
    temperature, top_k, top_p, min_p = zip(*values, strict=True)
    return sampler.Rows(
        temperature=torch.tensor(temperature, dtype=torch.float32, device=DEVICE),
        top_k=torch.tensor(top_k, dtype=torch.int64, device=DEVICE),
        top_p=torch.tensor(top_p, dtype=torch.float64, device=DEVICE),
        min_p=torch.tensor(min_p, dtype=torch.float32, device=DEVICE),
        seed=torch.arange(len(values), device=DEVICE) * 1_000_003 - 7,
        widest=max(top_k),
    )


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [50, 1000])
def test_kernel_chooses_as_torch_does(vocab: int) -> None:
    settings = [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (1.0, 20, 0.5, 0.0),
        (2.0, 0, 1.0, 0.1),
        (1.0, 40, 0.9, 0.01),
        (0.01, 0, 0.3, 0.0),
        (1.0, 1, 1.0, 0.0),
    ]
    rows = rows_of(settings * 2)
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(len(settings) * 2, vocab, generator=generator) * 4).to(DEVICE)
    logits[5:9] = logits[5:9].round()  # many equal ones
    slots = torch.arange(len(logits), device=DEVICE)
    for position in (1, 77):
        positions = torch.full((len(logits),), position, device=DEVICE)
        reference = sampler.choose(logits, rows, positions, ALL)
        tokens = triton_sampler.choose_by_slot(rows, logits, slots, positions)
        assert tokens.tolist() == reference.tolist()
        some = torch.tensor([7, 2, 11], device=DEVICE)  # rows of logits in any order
        tokens = triton_sampler.choose_by_slot(rows, logits[some], some, positions[:3])
        assert tokens.tolist() == reference[some].tolist()


def test_kernel_marks_rows_that_are_not_finite() -> None:
    logits = torch.zeros((4, 33), device=DEVICE)
    logits[1, 4] = torch.nan
    logits[2, 4] = torch.inf
    logits[3] = -torch.inf
    rows = rows_of([(1.0, 3, 0.5, 0.0)] * 4)
    slots, positions = torch.zeros((2, 4), dtype=torch.int64, device=DEVICE)
    tokens = triton_sampler.choose_by_slot(rows, logits, slots, positions).tolist()
    assert tokens[1:] == [sampler.INVALID] * 3
    assert 0 <= tokens[0] < 33
