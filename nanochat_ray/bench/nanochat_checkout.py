"""nanochat's model and optimizer, from a checkout, for benchmarks beside ours."""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

import torch

from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT

SHAPE_FIELDS = (
    *("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"),
)
"""Fields of its ``GPTConfig``, named as ours."""


def shape_of(config: ModelConfig) -> dict[str, Any]:
    """Arguments of its ``GPTConfig``."""
    return {name: getattr(config, name) for name in SHAPE_FIELDS}


def load(checkout: str, dtype: str, compiles: bool = False) -> Any:
    """Its module ``nanochat.gpt``, computing in ``dtype``. Once a process: it reads that at import.

    Packages that only its other parts need are left empty. Nothing is compiled unless ``compiles``:
    on a CPU that took longer than it gave.
    """
    os.environ["NANOCHAT_DTYPE"] = dtype
    if not compiles:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path.insert(0, checkout)
    for name in ("wandb", "kernels", "filelock"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
    return importlib.import_module("nanochat.gpt")


def model_of(checkout: str, model: GPT) -> Any:
    """Its ``GPT`` with the weights of ``model``, in float32 on the CPU, for evaluation.

    ValueError if it has no such architecture."""
    weights = weights_of(model)
    peer = load(checkout, "float32")
    gpt = peer.GPT(peer.GPTConfig(**shape_of(model.config)))
    gpt.init_weights()
    gpt.load_state_dict(weights)
    return gpt.eval().requires_grad_(False)


def weights_of(model: GPT) -> dict[str, torch.Tensor]:
    """The weights of ``model`` for its ``GPT``, by the same names.

    A model without backout subtracts nothing. ValueError names the field of an architecture that it
    does not have."""
    config = model.config
    # Of what is left, ``dropout`` and ``residual_decay`` only change training.
    rest = {name: getattr(config, name) for name in ("backout", "dropout", "residual_decay")}
    nearest = ModelConfig.modern(**shape_of(config), **rest)
    for name, value in vars(nearest).items():
        if getattr(config, name) != value:
            raise ValueError(
                f"model.{name}={getattr(config, name)!r} is not allowed: nanochat has {value!r}"
            )
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    return weights if config.backout else {**weights, "backout_lambda": torch.zeros(1)}
