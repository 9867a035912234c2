"""One run of ``bench learn``: a model from fresh weights, trained by one of four optimizers."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanochat_ray.bench import nanochat_checkout
from nanochat_ray.data.shards import SequenceReader
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES
from nanochat_ray.optim.groups import build_groups
from nanochat_ray.optim.schedule import lr_factor
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.train import recipe
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.data_loader import ShardDataLoader, open_dataset
from nanochat_ray.train.step import Batch, split, train_step
from nanochat_ray.train.validation import bits_per_byte


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run; ``model``, ``optim`` and ``train`` override fields of the configurations."""

    storage: str
    dataset: str
    system: str
    rate: float
    seed: int
    steps: int
    depth: int
    width: int
    global_batch_size: int
    eval_sequences: int
    nanochat: str = ""
    row_tokens: int = 0
    """Train on the first tokens of each row only; 0 takes all."""
    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


def build(trial: Trial, vocab_size: int, length: int) -> tuple[GPT, TrainConfig]:
    """The trial's model with fresh weights, and how it is trained."""
    heads = max(1, trial.width // 64)
    fields = {
        "vocab_size": vocab_size,
        "n_layer": trial.depth,
        "n_head": heads,
        "n_kv_head": heads,
        "n_embd": trial.width,
        "sequence_len": length,
    }
    config = ModelConfig.modern(**{**fields, **trial.model})
    model = GPT(config, DTYPES["bf16"])
    model.init_weights(torch.Generator().manual_seed(trial.seed))
    batch = trial.global_batch_size * length
    optim = recipe.optim_config(config, batch, trial.steps * batch).with_scaled_lr(trial.rate)
    train = TrainConfig(
        steps=trial.steps,
        global_batch_size=trial.global_batch_size,
        micro_batch_size=trial.global_batch_size,
        seed=trial.seed,
        precision="bf16",
        optim=dataclasses.replace(optim, **trial.optim),
        **trial.train,
    )
    return model, train


def run_trial(trial: Trial) -> dict[str, float]:
    """Trains and returns ``bits_per_byte`` and the processor's ``seconds`` of the steps.

    With ``row_tokens`` the model is then shown whole rows, and ``beyond_plain`` and
    ``beyond_yarn`` are the figures of the tokens that lie past what it was trained on.
    """
    torch.set_num_threads(1)
    store, manifest, tokenizer = open_dataset(trial.storage, trial.dataset)
    length = trial.row_tokens or manifest.sequence_len
    model, train = build(trial, tokenizer.vocab_size, length)
    config = model.config
    reader = SequenceReader(store, manifest, "train")
    systems = {"adamw": adamw, "adamw by kind": by_kind, "nanochat": nanochat, "ours": ours}
    step = systems[trial.system](model, train, trial)
    began = time.process_time()
    for k, rows in enumerate(ShardDataLoader(reader, train, 0, 1).batches(0)):
        step(k, Batch(rows.ids[:, : length + 1]))
    seconds = time.process_time() - began
    held_out = SequenceReader(store, manifest, "val")
    ids, _ = held_out.read(np.arange(min(trial.eval_sequences, len(held_out))))
    model.eval()
    lengths = tokenizer.byte_lengths()
    metrics = bits_per_byte(model, ids[:, : length + 1], lengths, micro_batch_size=8)
    result = {"bits_per_byte": metrics, "seconds": seconds}
    if trial.row_tokens:
        yarn = dataclasses.replace(config, rope_factor=manifest.sequence_len / length)
        longer = GPT(yarn, model.compute_dtype)
        longer.load_state_dict(model.state_dict())
        result["beyond_plain"] = beyond(model, ids, lengths, length)
        result["beyond_yarn"] = beyond(longer.eval(), ids, lengths, length)
    return result


@torch.no_grad()
def beyond(model: GPT, ids: np.ndarray, byte_lengths: np.ndarray, trained_length: int) -> float:
    """Bits per byte of the targets from position ``trained_length`` on, given all before them."""
    rows = torch.from_numpy(ids.astype(np.int64))
    sizes = torch.from_numpy(byte_lengths.astype(np.int64))[rows[:, 1:]]
    sizes[:, :trained_length] = 0
    targets = rows[:, 1:].masked_fill(sizes == 0, -1)
    nats = sum(
        float(model.loss(rows[at : at + 8, :-1], targets[at : at + 8], "sum"))
        for at in range(0, len(rows), 8)
    )
    return nats / (math.log(2) * int(sizes.sum()))


Step = Callable[[int, Any], object]


def ours(model: GPT, train: TrainConfig, trial: Trial) -> Step:
    optimizer = ShardedOptimizer(model, train.optim, model.compute_dtype)
    return lambda k, rows: train_step(model, optimizer, rows, k, train)


def loss_of(model: GPT, rows: Any) -> torch.Tensor:
    (micro,) = split(rows, len(rows.ids), torch.device("cpu"))
    return model.loss(micro.inputs, micro.targets)


def adamw(model: GPT, train: TrainConfig, trial: Trial) -> Step:
    """betas 0.9 and 0.95, decay 0.1 of matrices, 2% warm-up, then a cosine to a tenth."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    scalars = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scalars, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=trial.rate, betas=(0.9, 0.95))
    warmup = max(1, train.steps // 50)

    def factor(k: int) -> float:
        share = max(0.0, k - warmup) / max(1, train.steps - warmup)
        return min(1.0, (k + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * share))

    return with_schedule(model, optimizer, factor)


def by_kind(model: GPT, train: TrainConfig, trial: Trial) -> Step:
    """Ours in all but the matrices, which get AdamW at the trial's rate."""
    # The trial's rate is the matrices': the others' are as our rules give them.
    optim = recipe.optim_config(
        model.config,
        train.global_batch_size * model.config.sequence_len,
        train.steps * train.global_batch_size * model.config.sequence_len,
    )
    parameters = dict(model.named_parameters())
    groups = []
    for group in build_groups(parameters.items(), optim):
        muon = group.kind == "muon"
        groups.append(
            {
                "params": [parameters[name] for name in group.names],
                "lr": trial.rate if muon else group.lr,
                "betas": (0.9, 0.95) if muon else (group.beta1, group.beta2),
                "eps": group.eps,
                "weight_decay": 0.1 if muon else group.weight_decay,
            }
        )
    optimizer = torch.optim.AdamW(groups)
    return with_schedule(model, optimizer, lambda k: lr_factor(k, train.steps, optim))


def with_schedule(
    model: GPT, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]
) -> Step:
    """Steps with gradients clipped to a norm of 1 and all rates times ``factor(step)``."""
    full = [group["lr"] for group in optimizer.param_groups]

    def step(k: int, rows: Any) -> None:
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate * factor(k)
        loss_of(model, rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def nanochat(model: GPT, train: TrainConfig, trial: Trial) -> Step:
    """nanochat's optimizer on our model (its names are ours), with its schedules of July 2026.

    Its 40 steps of warm-up are cut to a tenth of a run that is shorter than 400.
    """
    peer = nanochat_checkout.load(trial.nanochat, "bfloat16")
    model.get_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    # scripts/base_train.py: decay falls with the batch's root and the horizon.
    batch = train.global_batch_size * model.config.sequence_len
    reference_tokens = recipe.REFERENCE_TOKENS
    decay = 0.28 * math.sqrt(batch / recipe.REFERENCE_BATCH)
    decay *= reference_tokens / (train.steps * batch)
    rate = trial.rate
    optimizer = peer.GPT.setup_optimizer(
        model,
        unembedding_lr=0.008 * rate,
        embedding_lr=0.3 * rate,
        scalar_lr=0.5 * rate,
        matrix_lr=0.02 * rate,
        weight_decay=min(decay, 0.28),
    )
    warmdown, warmup = round(0.65 * train.steps), max(1, min(40, train.steps // 10))

    def step(k: int, rows: Any) -> None:
        remaining = (train.steps - k) / warmdown
        factor = min((k + 1) / warmup, 1.0, remaining + (1 - remaining) * 0.05)
        momentum = 0.85 + 0.12 * min(1.0, k / 400)
        if k >= 400 and remaining <= 1:
            momentum = 0.97 * remaining + 0.90 * (1 - remaining)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = (
                    min(decay, 0.28) * 0.5 * (1 + math.cos(math.pi * k / train.steps))
                )
        loss_of(model, rows).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return step
