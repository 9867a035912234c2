"""The torch dtype of each ``Precision``: the one table, for training, serving and export."""

from __future__ import annotations

from typing import Final

import torch

from nanochat_ray.model.config import Precision

DTYPES: Final[dict[Precision, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16}
