"""The recipe: from depth to width, heads, context, batch, training tokens and learning rates.

Each number has its source beside it. "nanochat" is karpathy/nanochat of July 2026; "measured" is
``optim/BENCHMARKS.md``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nanochat_ray.model.config import ModelConfig, Precision, count_parameters
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.train.config import TrainConfig

ASPECT = 64
"""Width per layer (nanochat)."""
TOKENS_PER_PARAMETER = 12.0
"""Compute-optimal tokens per parameter of blocks and head (nanochat's own scaling runs)."""
REFERENCE_BATCH = 2**19
"""Tokens of a batch at which nanochat tuned its learning rates, at depth 12."""
REFERENCE_STEPS = 2_500
"""Steps of that run."""
REFERENCE_TOKENS = 1.32e9
"""Compute-optimal tokens of depth 12 with a vocabulary of 32,768."""


def head_dim(width: int) -> int:
    """128 as in nanochat. A narrow model gets heads half as wide: it would have too few of them."""
    return 128 if width >= 768 else 64


def model_config(
    depth: int, vocab_size: int, *, preset: str = "modern", sequence_len: int = 0, **fields: Any
) -> ModelConfig:
    """The transformer of a depth. ValueError if ``depth`` is below 1."""
    if depth < 1:
        raise ValueError(f"depth={depth} is not allowed: a whole number from 1")
    dim = head_dim(depth * ASPECT)
    width = -(-depth * ASPECT // dim) * dim
    length = sequence_len or (512 if depth < 8 else 2048)
    shape = {
        "vocab_size": vocab_size,
        "n_layer": depth,
        "n_head": width // dim,
        "n_kv_head": width // dim,
        "n_embd": width,
        "sequence_len": length,
        # Windows save work only where the context is long (measured: none at 512).
        "window_pattern": "SSSL" if length >= 2048 else "L",
        # nanochat's tuning at depth 12 kept it; at depth 4 it gives nothing (optim/BENCHMARKS.md).
        "backout": preset == "modern" and depth >= 12,
    }
    return ModelConfig.preset(preset, **{**shape, **fields})


MANY_PASSES = 16
"""Passes over the data above which more of them hardly help: up to 4 are nearly as good as new
text, and the gain is gone at about 16 (Muennighoff et al., arXiv 2305.16264)."""


def training_tokens(config: ModelConfig, tokens_per_param: float = TOKENS_PER_PARAMETER) -> int:
    """Training tokens."""
    counts = count_parameters(config)
    return int(tokens_per_param * (counts.matrices + counts.head))


def batch_tokens(tokens: int) -> int:
    """Tokens of a global batch for a run of ``tokens``: a power of two.

    nanochat: ∝ tokens^0.383 (Power Lines, arXiv 2505.13738) through its reference. Measured: runs
    of some ten million tokens want fewer, so below the reference the exponent is steeper.
    """
    ratio = tokens / REFERENCE_TOKENS
    exact = REFERENCE_BATCH * ratio ** (0.383 if ratio >= 1 else 0.65)
    return int(min(max(2 ** round(math.log2(exact)), 2**11), 2**21))


def lr_scale(steps: int) -> float:
    """Factor on all learning rates for a run of that many steps; see optim/BENCHMARKS.md.

    nanochat scales by the square root of the batch, which starves small batches. What the best
    rate follows, measured, is how many steps it has to get there: 1 at the 2,500 steps for which
    they were tuned, more for shorter runs, less for longer ones.
    """
    return float(min(max((steps / REFERENCE_STEPS) ** -0.3, 0.3), 3.0))


def optim_config(config: ModelConfig, batch: int, tokens: int) -> OptimConfig:
    """Learning rates for a model, a batch and training tokens.

    At nanochat's reference they are nanochat's. In shorter runs (measured: optim/BENCHMARKS.md)
    those of matrices and embeddings rise, that of the head does not, those of the scalars fall,
    and momentum and the embeddings' second moment average over a share of the run.
    """
    steps = max(1, tokens // batch)
    scale = lr_scale(steps)
    # AdamW's learning rates fall with the square root of the width (nanochat, tuned at 768).
    narrow = (config.n_embd / 768) ** -0.5
    # Decay so that the averaging time in tokens stays (Wang and Aitchison, arXiv 2405.13698).
    decay = 0.28 * (batch / REFERENCE_BATCH) ** 0.5 * REFERENCE_TOKENS / max(tokens, 1)
    return OptimConfig(
        matrix_lr=0.02 * scale,
        embedding_lr=0.3 * scale * narrow,
        unembedding_lr=0.008 * min(scale, 1.0) * narrow,
        scalar_lr=0.5 * min(scale, scale**-2),
        embedding_beta2=1 - min(max(12.5 / steps, 0.005), 0.05),
        weight_decay=min(decay, 0.2),
        momentum=1 - min(max(0.05 * (steps / REFERENCE_STEPS) ** -0.4, 0.03), 0.2),
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    model: ModelConfig
    train: TrainConfig
    tokens: int


def base_plan(
    model: ModelConfig,
    *,
    tokens: int = 0,
    tokens_per_param: float = TOKENS_PER_PARAMETER,
    batch: int = 0,
    micro_batch_size: int = 0,
    workers: int = 1,
    precision: Precision = "bf16",
    seed: int = 0,
) -> Plan:
    """A whole run from a model; ``tokens`` and ``batch`` (in tokens) override the recipe."""
    budget = tokens or training_tokens(model, tokens_per_param)
    # Not rounded to the workers: the same run may resume with another number of them.
    global_batch_size = max(workers, (batch or batch_tokens(budget)) // model.sequence_len)
    micro = largest_micro(
        global_batch_size, workers, micro_batch_size or 2**14 // model.sequence_len
    )
    size = global_batch_size * model.sequence_len
    steps = max(1, round(budget / size))
    return Plan(
        model=model,
        train=TrainConfig(
            stage="base",
            steps=steps,
            global_batch_size=global_batch_size,
            micro_batch_size=micro,
            seed=seed,
            precision=precision,
            optim=optim_config(model, size, steps * size),
            eval_every=-(-steps // 3),
            save_every=-(-steps // 4),
        ),
        tokens=steps * size,
    )


SFT_BATCH, SFT_GPU_BATCH = 2**14, 2**17
"""Tokens of a batch of fine-tuning: at most on a CPU (measured), at least on a GPU, where 2^14
tokens on each of 8 keep matmuls large. nanochat takes 2^19."""
SFT_STEPS = 200
"""Steps an epoch below which a GPU's batch does not grow, or there would be nothing to schedule."""


def sft_batch_tokens(tokens: int, *, on_gpu: bool) -> int:
    """Tokens of a global batch for fine-tuning on ``tokens``: a power of two."""
    size = batch_tokens(tokens)
    if not on_gpu:
        return min(SFT_BATCH, size)
    largest = int(2 ** math.floor(math.log2(max(tokens / SFT_STEPS, 2**11))))
    return max(min(SFT_BATCH, size), min(max(SFT_GPU_BATCH, size), largest))


def sft_config(
    model: ModelConfig,
    num_sequences: int,
    *,
    epochs: float = 1.0,
    batch: int = 0,
    micro_batch_size: int = 0,
    workers: int = 1,
    precision: Precision = "bf16",
    on_gpu: bool = False,
    seed: int = 0,
) -> TrainConfig:
    """Fine-tuning: learning rates of a base run, halved, that fall linearly to zero.

    ``batch`` is in tokens; 0 follows the rule.
    """
    length = model.sequence_len
    size = batch or sft_batch_tokens(num_sequences * length, on_gpu=on_gpu)
    global_batch_size = max(workers, size // length)
    steps = max(1, round(epochs * num_sequences / global_batch_size))
    optim = optim_config(model, global_batch_size * length, num_sequences * length)
    return TrainConfig(
        stage="sft",
        steps=steps,
        global_batch_size=global_batch_size,
        micro_batch_size=largest_micro(
            global_batch_size, workers, micro_batch_size or 2**14 // length
        ),
        seed=seed,
        precision=precision,
        optim=dataclasses.replace(
            optim.with_scaled_lr(0.5),
            weight_decay=0.0,
            warmup_ratio=0.02,
            warmdown_ratio=0.9,
            final_lr_frac=0.0,
        ),
        eval_every=-(-steps // 3),
        save_every=-(-steps // 2),
    )


RL_LR_SCALE = 0.1
"""Learning rates of reinforcement learning relative to those of the fine-tuning before (measured:
rl/BENCHMARKS.md)."""
RL_MICRO_BATCH_SIZE = 32
"""Sampled answers are short."""


def rl_config(
    model: ModelConfig,
    optim: OptimConfig | None,
    *,
    steps: int,
    rollouts: int,
    precision: Precision = "fp32",
    micro_batch_size: int = 0,
) -> TrainConfig:
    """Reinforcement learning from a model whose fine-tuning used ``optim`` (None: unknown).

    ``rollouts``: answers of a step, at most.
    """
    if optim is None:
        optim = sft_config(model, 1000).optim
    return TrainConfig(
        stage="rl",
        steps=steps,
        global_batch_size=rollouts,
        micro_batch_size=micro_batch_size or largest_micro(rollouts, 1, RL_MICRO_BATCH_SIZE),
        precision=precision,
        optim=dataclasses.replace(
            optim.with_scaled_lr(RL_LR_SCALE),
            weight_decay=0.0,
            warmup_ratio=0.02,
            warmdown_ratio=0.6,
            final_lr_frac=0.1,
        ),
        eval_every=-(-steps // 4),
        save_every=-(-steps // 4),
    )


def largest_micro(batch_size: int, workers: int, most: int) -> int:
    """The largest divisor of ``batch_size`` that is at most ``most`` and a worker's share.

    All are numbers of sequences.
    """
    most = max(1, min(most, -(-batch_size // workers)))
    return next(n for n in range(most, 0, -1) if batch_size % n == 0)
