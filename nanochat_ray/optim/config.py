"""The configuration of the optimizer and of its schedules."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from nanochat_ray.checks import require
from nanochat_ray.config import require_finite

Orthogonalizer = Literal["polar_express", "newton_schulz"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon and AdamW: learning rates, schedules, options; absolute values, scaled for the run."""

    matrix_lr: float = 0.02
    """Muon, for every matrix inside a block."""
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    scalar_lr: float = 0.5
    weight_decay: float = 0.0
    """Muon's weight decay; multiplied by the learning rate and by the schedule's factor."""
    orthogonalizer: Orthogonalizer = "polar_express"
    """Muon's iteration towards the nearest semi-orthogonal matrix."""
    normuon: bool = True
    """Even out the sizes of a Muon update's neurons by their running second moments."""
    row_normalize: bool = True
    """Give the rows of a gradient equal norms before the orthogonalisation (MuonEq-R)."""
    cautious: bool = False
    """Decay a weight only where that agrees with its update."""
    momentum: float = 0.95
    warmup_ratio: float = 0.02
    """Share of the steps in which the learning rates rise."""
    embedding_beta2: float = 0.995
    """Decay of the second moment of AdamW for the embeddings."""
    warmdown_ratio: float = 0.8
    """Share of the steps in which the learning rates fall to ``final_lr_frac``."""
    final_lr_frac: float = 0.05
    """Final learning rate as a fraction of the peak."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 turns clipping off."""

    def learning_rates(self) -> dict[str, float]:
        """Each learning rate by the name of its field."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_lr")}

    def with_scaled_lr(self, factor: float) -> Self:
        """The same configuration with every learning rate times ``factor``."""
        changes: dict[str, Any] = {n: lr * factor for n, lr in self.learning_rates().items()}
        return replace(self, **changes)

    def __post_init__(self) -> None:
        require_finite(self)
        for name in (*self.learning_rates(), "weight_decay", "grad_clip"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        kinds = get_args(Orthogonalizer)
        method = self.orthogonalizer
        require(method in kinds, "orthogonalizer", method, " or ".join(kinds))
        for name in ("warmup_ratio", "warmdown_ratio", "final_lr_frac"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        for name in ("momentum", "embedding_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "from 0 to below 1")
