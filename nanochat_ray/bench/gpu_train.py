"""The training step on a GPU: time, MFU and memory, and nanochat's beside it."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nanochat_ray.bench import nanochat_checkout
from nanochat_ray.bench.gpu_report import Report, device_ms
from nanochat_ray.model.config import ModelConfig, flops_per_token
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.loss import softcap_cross_entropy
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.train import hardware, memory, recipe
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.step import Batch, train_step

GIB = 1 << 30
CUDA = torch.device("cuda")
RUNS: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (12, 32, ("compile",)),
    (20, 16, ("compile",)),
    (12, 32, ()),
    (12, 32, ("compile", "fp8")),
    (20, 16, ("compile", "fp8")),
    (24, 16, ("compile",)),
    (24, 16, ("compile", "checkpoint")),
)
"""Depth, sequences of 2,048 tokens, and what is switched on."""


class Setup:
    """A model of the recipe with its optimizer, and one batch of random tokens."""

    def __init__(self, depth: int, size: int, modes: tuple[str, ...], **fields: Any):
        self.config = recipe.model_config(depth, 32768, sequence_len=2048, **fields)
        self.model = GPT(self.config, torch.bfloat16)
        self.model.init_weights(torch.Generator().manual_seed(0))
        self.model.to(CUDA).train()
        if "fp8" in modes:
            self.model.use_fp8()
        self.model.checkpoint_activations = "checkpoint" in modes
        if "compile" in modes:
            self.model.compile_blocks()
        self.train = TrainConfig(
            steps=1000,
            global_batch_size=size,
            micro_batch_size=size,
            precision="bf16",
            checkpoint_activations="checkpoint" in modes,
            optim=recipe.optim_config(self.config, 2**19, 10**9),
        )
        self.optimizer = ShardedOptimizer(
            self.model, self.train.optim, torch.bfloat16, compile_update="compile" in modes
        )
        ids = np.random.default_rng(0).integers(0, 32768, (size, 2049)).astype(np.uint16)
        self.batch = Batch(ids)

    def step(self, number: int) -> None:
        train_step(self.model, self.optimizer, self.batch, number, self.train)


def run(report: Report, quick: bool) -> None:
    report.part("ceilings", _ceilings, report, 256 if quick else 8192)
    for depth, size, modes in ((2, 2, ()), (2, 2, ("compile",))) if quick else RUNS:
        name = f"d{depth} × {size} {' '.join(modes) or 'eager'}"
        report.part(name, _measure, report, name, depth, size, modes)


def _measure(report: Report, name: str, depth: int, size: int, modes: tuple[str, ...]) -> None:
    torch.cuda.reset_peak_memory_stats()
    setup = Setup(depth, size, modes)
    _time(report, name, setup.config, size, setup.step)
    estimate = memory.estimate(setup.config, setup.train, world=1, on_gpu=True).total
    report.note(f"{name}: estimated GiB", f"{estimate / GIB:.1f}")
    if modes == ("compile",):
        _share_of_loss_and_optimizer(report, name, setup, size)


def _ceilings(report: Report, n: int) -> None:
    a, b = (torch.randn(n, n, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * n**3 / device_ms(lambda: a @ b) / 1e9
    source = torch.empty(n * n * 8, device=CUDA, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / device_ms(lambda: target.copy_(source)) / 1e9
    report.note("bf16 matmul; memory", f"{rate:.0f} TFLOP/s; {bandwidth:.2f} TB/s read and written")


def _time(
    report: Report, name: str, config: ModelConfig, size: int, step: Callable[[int], Any]
) -> None:
    start = time.perf_counter()
    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    first, times = time.perf_counter() - start, []
    for number in range(3, 11):
        start = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds, tokens = statistics.median(times), size * 2048
    peak = hardware.detect(CUDA).peak("bf16")
    mfu = f"{tokens / seconds * flops_per_token(config) / peak:.3f}" if peak else "?"
    memory_gib = torch.cuda.max_memory_reserved() / GIB
    report.note(
        name,
        f"{seconds * 1e3:.1f} ms, {tokens / seconds / 1e3:.0f}k tokens/s, MFU {mfu}, "
        f"{memory_gib:.1f} GiB; first three steps {first:.0f} s",
    )


def _share_of_loss_and_optimizer(report: Report, name: str, setup: Setup, size: int) -> None:
    config, weight = setup.config, setup.model.lm_head.weight
    hidden = torch.randn(size * 2048, config.n_embd, device=CUDA, dtype=torch.bfloat16)
    hidden.requires_grad_()
    targets = torch.randint(config.vocab_size, (size * 2048,), device=CUDA)

    def loss() -> None:
        value = softcap_cross_entropy(
            hidden, weight, targets, cap=config.softcap, vocab=config.vocab_size
        )
        value.sum().backward()
        hidden.grad = None

    def update() -> None:
        setup.optimizer.step(3, lr_factor=1.0, momentum=0.95)

    value = f"{device_ms(loss, 5):.1f}, {device_ms(update, 5):.1f} ms"
    report.note(f"{name}: of it loss, optimizer", value)


def compare(report: Report, checkout: str, quick: bool, turns: int) -> None:
    """nanochat's compiled step and ours, in bf16 and in FP8, in turns. Its FlashAttention 3 comes
    from a hub, so all have full windows."""
    sys.path.insert(0, checkout)
    for depth, size in ((2, 2),) if quick else ((12, 32), (20, 16)):
        for turn, side in itertools.product(range(turns), ("ours", "nanochat", "ours in FP8")):
            name = f"d{depth} × {size}, full attention, {side}, turn {turn}"
            if side == "nanochat":
                report.part(name, _time_nanochat, report, name, depth, size, checkout)
            else:
                modes = ("compile", "fp8") if side == "ours in FP8" else ("compile",)
                report.part(name, _time_ours, report, name, depth, size, modes)


def _time_ours(report: Report, name: str, depth: int, size: int, modes: tuple[str, ...]) -> None:
    torch.cuda.reset_peak_memory_stats()
    setup = Setup(depth, size, modes, window_pattern="L")
    _time(report, name, setup.config, size, setup.step)


def _time_nanochat(report: Report, name: str, depth: int, size: int, checkout: str) -> None:
    torch.cuda.reset_peak_memory_stats()
    module = nanochat_checkout.load(checkout, "bfloat16", compiles=True)
    config = recipe.model_config(depth, 32768, sequence_len=2048, window_pattern="L")
    with CUDA:
        model = module.GPT(module.GPTConfig(**nanochat_checkout.shape_of(config)))
    model.init_weights()
    optimizer = model.setup_optimizer()
    run_model = torch.compile(model, dynamic=False)
    ids = torch.randint(32768, (size, 2049), device=CUDA)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(_: int) -> None:
        loss = run_model(inputs, targets)
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        loss.item()

    _time(report, name, config, size, step)
