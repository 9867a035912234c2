"""A training step of ours and of nanochat's, on equal weights: what ``bench train`` compares.

Each returns its tokens a second and, as ``probe``, a few logits. ``tokens`` are those of a batch.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from nanochat_ray.bench import nanochat_checkout
from nanochat_ray.model.config import ModelConfig, Precision
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.train import recipe
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.step import Batch, train_step


def by_formula(parameters: Any) -> None:
    """Equal weights for equal names, whoever the model is from."""
    with torch.no_grad():
        for number, (_, p) in enumerate(sorted(parameters)):
            n = torch.arange(p.numel(), dtype=torch.float64)
            p.copy_((0.05 * torch.sin(0.7 * n + number)).view(p.shape).to(p.dtype))


def batch_of(config: ModelConfig, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (tokens // config.sequence_len, config.sequence_len + 1)
    return torch.randint(config.vocab_size, size, generator=generator)


def ours(config: ModelConfig, tokens: int, steps: int, precision: Precision) -> dict[str, Any]:
    model = GPT(config, DTYPES[precision])
    by_formula(model.named_parameters())
    ids = batch_of(config, tokens)
    with torch.no_grad():
        probe = model(ids[:1, :-1])[0, -1, :16].tolist()
    rows = len(ids)
    train = TrainConfig(
        steps=10**6,
        global_batch_size=rows,
        micro_batch_size=rows,
        optim=recipe.optim_config(config, tokens, 10**7),
    )
    optimizer = ShardedOptimizer(model, train.optim, model.compute_dtype)
    batch = Batch(ids.numpy())
    seconds = step_seconds(lambda k: train_step(model, optimizer, batch, k, train), steps)
    return {"tokens_per_s": tokens / seconds, "probe": probe}


def theirs(
    config: ModelConfig, tokens: int, steps: int, precision: Precision, checkout: str
) -> dict[str, Any]:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    peer = nanochat_checkout.load(checkout, dtype)
    model = peer.GPT(peer.GPTConfig(**nanochat_checkout.shape_of(config)))
    model.init_weights()
    by_formula(model.named_parameters())
    ids = batch_of(config, tokens)
    with torch.no_grad():
        probe = model(ids[:1, :-1])[0, -1, :16].tolist()
    optimizer = model.setup_optimizer()
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(_: int) -> None:
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        loss.item()

    seconds = step_seconds(step, steps)
    return {"tokens_per_s": tokens / seconds, "probe": probe}


def step_seconds(step: Any, steps: int) -> float:
    """Median seconds of a step, after three that warm up."""
    for k in range(3):
        step(k)
    seconds = []
    for k in range(3, 3 + steps):
        began = time.perf_counter()
        step(k)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
