"""Schedules at steps whose values are computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.schedule import lr_factor, momentum, window_share

CONFIG = OptimConfig(warmup_ratio=0.1, warmdown_ratio=0.4, final_lr_frac=0.2)


def test_defaults_are_those_of_depth_12() -> None:
    """nanochat's gpt.py and base_train.py (July 2026), before they are scaled for a run."""
    config = OptimConfig()
    assert config.learning_rates() == {
        "matrix_lr": 0.02,
        "embedding_lr": 0.3,
        "unembedding_lr": 0.008,
        "scalar_lr": 0.5,
    }
    assert (config.warmup_ratio, config.warmdown_ratio, config.final_lr_frac) == (0.02, 0.8, 0.05)
    assert (config.momentum, config.embedding_beta2) == (0.95, 0.995)
    assert (config.weight_decay, config.grad_clip) == (0, 0)


@pytest.mark.parametrize(
    ("step", "factor"),
    # Of 20 steps 2 rise, 10 stay, 8 fall to 0.2 + 0.8 / 8.
    [(0, 1 / 3), (1, 2 / 3), (2, 1), (11, 1), (12, 1), (13, 0.9), (16, 0.6), (19, 0.3)],
)
def test_learning_rate_factor(step: int, factor: float) -> None:
    assert lr_factor(step, 20, CONFIG) == pytest.approx(factor, abs=1e-12)


def test_factor_where_warmdown_follows_at_once() -> None:
    """Of 4 steps 2 rise, and all would fall: from 0.2 + 0.8 / 2 on."""
    config = OptimConfig(warmup_ratio=0.5, warmdown_ratio=1.0, final_lr_frac=0.2)
    factors = [lr_factor(step, 4, config) for step in range(4)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 0.6, 0.4], abs=1e-12)


def test_factor_without_warmup_or_warmdown() -> None:
    config = OptimConfig(warmup_ratio=0, warmdown_ratio=0)
    assert [lr_factor(step, 5, config) for step in range(5)] == [1.0] * 5


@pytest.mark.parametrize(
    ("step", "steps", "value"),
    # nanochat: from 0.85 to 0.95 over 300 steps; here over a tenth of the run if that is fewer.
    [(0, 9000, 0.85), (150, 9000, 0.90), (300, 9000, 0.95), (8999, 9000, 0.95),
     (0, 50, 0.85), (1, 50, 0.87), (5, 50, 0.95), (6, 50, 0.95),
     (0, 59, 0.85), (1, 59, 0.87), (0, 3, 0.85), (1, 3, 0.95)],
)  # fmt: skip
def test_momentum(step: int, steps: int, value: float) -> None:
    assert momentum(step, steps, OptimConfig(momentum=0.95)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("step", [0, 3, 40])
def test_low_momentum_is_constant(step: int) -> None:
    assert momentum(step, 50, OptimConfig(momentum=0.8)) == 0.8


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.25), (6, 0.25), (7, 0.5), (13, 0.5), (14, 0.75), (19, 0.75), (20, 1)]
)
def test_window_share_in_three_stages(step: int, share: float) -> None:
    assert window_share(step, 40, 0.5) == share


def test_windows_are_whole_without_warmup() -> None:
    assert window_share(0, 9, 0.0) == 1.0


@pytest.mark.parametrize(
    ("names", "values", "others"),
    [
        (("matrix_lr", "scalar_lr", "weight_decay", "grad_clip"), [0, 9], [-1e-9]),
        (("warmup_ratio", "warmdown_ratio", "final_lr_frac"), [0, 1], [-1e-9, 1.001]),
        (("momentum", "embedding_beta2"), [0, 0.999], [-1e-9, 1]),
        (("orthogonalizer",), ["polar_express", "newton_schulz"], ["svd"]),
    ],
)
def test_ranges_to_their_bounds(
    names: tuple[str, ...], values: list[Any], others: list[Any]
) -> None:
    for name in names:
        for value in values:
            OptimConfig(**{name: value})
        for value in others:
            with pytest.raises(ValueError, match=f"^{name}={value!r} is not allowed: "):
                OptimConfig(**{name: value})
