"""What the engine's ``precision`` means: the dtypes of weights, activations and checkpoints."""

from __future__ import annotations

from typing import Final

import torch

from nanochat_ray.engine.config import EnginePrecision

WEIGHT_DTYPES: Final[dict[EnginePrecision, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}
"""Of the matmuls' weights."""


def activation_dtype(precision: EnginePrecision, has_native: bool) -> torch.dtype:
    """Of activations, keys and values. The C kernels (``has_native``) compute in float32 and round
    a matmul's input only; torch computes in the precision of the weights."""
    return torch.float32 if has_native else WEIGHT_DTYPES[precision]


def checkpoint_dtype(precision: EnginePrecision) -> torch.dtype:
    """In which a checkpoint is loaded, before the engine packs its weights."""
    return WEIGHT_DTYPES[precision]
