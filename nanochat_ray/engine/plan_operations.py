"""The operations of ``csrc/step.c``: its structs, and their fields from tensors."""

from __future__ import annotations

import ctypes
from enum import IntEnum, auto

import torch
from torch import Tensor

WEIGHT_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
"""By the dtype of the packed weight or of a table, as in ``csrc/weight_formats.h``."""
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Kind(IntEnum):
    """As in ``csrc/plan.h``."""

    GATHER = 0
    RMS_NORM = auto()
    LINEAR = auto()
    ROTARY = auto()
    ATTENTION = auto()
    RELU_SQUARED = auto()
    SOFTCAP = auto()
    ADD = auto()
    SCALE = auto()
    GATE = auto()


class Index(IntEnum):
    """Which rows GATHER takes."""

    IDS = 0
    PREVIOUS = auto()
    POSITIONS = auto()
    LOGITS = auto()


class Operation(ctypes.Structure):
    """As in ``csrc/plan.h``."""

    _fields_ = (
        ("kind", _INT),
        *((name, _POINTER) for name in ("x", "y", "weight", "factor")),
        *((name, _INT) for name in ("x_stride", "y_stride", "weight_stride", "width")),
        *((name, _INT) for name in ("format", "count", "extra")),
        ("value", ctypes.c_float),
    )


class Step(ctypes.Structure):
    """As in ``csrc/plan.h``."""

    _fields_ = (
        ("indices", _POINTER * len(Index)),
        *((name, _POINTER) for name in ("slots", "tile_starts")),
        *((name, _INT) for name in ("rows", "num_logits", "tiles", "document_start", "kv_length")),
        ("attention_scale", ctypes.c_float),
        *((name, _POINTER) for name in ("logits", "scratch")),
        ("threads", _INT),
    )


def operation(
    kind: Kind,
    y: Tensor | None,
    x: Tensor,
    *,
    weight: Tensor | None = None,
    factor: Tensor | None = None,
    width: int = 0,
    weight_format: int | None = None,
    count: int = 0,
    extra: int = 0,
    value: float = 1.0,
) -> Operation:
    """``y = kind(x)``; y None is the logits of the step. ``width`` is y's by default;
    ``weight_format`` that of the factor or of x."""
    dtype = x.dtype if factor is None else factor.dtype
    fields: dict[str, int | float | None] = {
        "kind": kind,
        "x": x.data_ptr(),
        "y": None if y is None else y.data_ptr(),
        "weight": None if weight is None else weight.data_ptr(),
        "factor": None if factor is None else factor.data_ptr(),
        "x_stride": x.stride(0),
        "y_stride": width if y is None else y.stride(0),
        "weight_stride": 0 if weight is None else weight.stride(0),
        "width": width or (0 if y is None else y.size(1)),
        "format": WEIGHT_FORMATS[dtype] if weight_format is None else weight_format,
        "count": count,
        "extra": extra,
        "value": value,
    }
    return Operation(**fields)
