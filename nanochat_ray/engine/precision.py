"""What the engine's ``precision`` means: the dtypes of weights, activations and checkpoints."""

from __future__ import annotations

from typing import Final

import torch

from nanochat_ray.engine.config import EnginePrecision

WEIGHT_DTYPES: Final[dict[EnginePrecision, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
"""Of the matmuls' weights."""


def table_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """Of embedding tables and scalars, where matmuls have weights in ``weight_dtype``."""
    return torch.bfloat16 if weight_dtype == torch.int8 else weight_dtype


def activation_dtype(weight_dtype: torch.dtype, has_native: bool = False) -> torch.dtype:
    """Of activations, keys and values. The C kernels (``has_native``) compute in float32 and round
    a matmul's input only; torch computes in the precision of the weights, if that is a float."""
    return torch.float32 if has_native or weight_dtype == torch.int8 else weight_dtype


def kv_dtype(weight_dtype: torch.dtype, has_native: bool = False) -> torch.dtype:
    """Of keys and values in slots. The C kernels store them in bfloat16 unless weights are
    float32, since decodes wait for memory; torch's attention needs those of the activations."""
    if has_native and weight_dtype != torch.float32:
        return torch.bfloat16
    return activation_dtype(weight_dtype, has_native)


def checkpoint_dtype(precision: EnginePrecision) -> torch.dtype:
    """In which a checkpoint is loaded, before the engine packs its weights."""
    return activation_dtype(WEIGHT_DTYPES[precision])
