"""From a configuration to the model that is trained."""

from __future__ import annotations

import os

import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.attention import use_flash_attention_3
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainerConfig


def build_model(
    config: TrainerConfig, root: Store, device: torch.device, *, loads_parent: bool = True
) -> GPT:
    """The model with its parent's weights, or random ones, ready for training on ``device``.

    Without ``loads_parent`` it has random weights also where there is a parent.
    """
    model = GPT(config.model, compute_dtype=DTYPES[config.train.precision]).to(device)
    if config.parent and loads_parent:
        name = config.about.get("parent_checkpoint")
        parent = checkpoint.load(root.child("runs", config.parent), name, optimizer=False)
        model.load_state_dict(parent.weights)
    else:
        model.init_weights(torch.Generator().manual_seed(config.train.seed))
    if config.train.fp8:
        model.use_fp8()
    use_flash_attention_3(device)
    if compiles(config, device):
        model.compile_blocks()
    model.checkpoint_activations = config.train.checkpoint_activations
    return model


def compiles(config: TrainerConfig, device: torch.device) -> bool:
    """Whether training on ``device`` is compiled: not RL, whose shapes differ."""
    mode, stage = config.train.compile, config.train.stage
    return mode == "on" or (mode == "auto" and device.type == "cuda" and stage != "rl")


def use_deterministic_algorithms() -> None:
    """Only deterministic operations from here on, in this process.

    On a CPU they all are for a fixed number of threads; on a GPU this costs speed. Must come
    before the first matmul on a GPU, where cuBLAS reads its workspace's size.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
