"""What a run will take, before it starts: as text for people, as one object for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from nanochat_ray.model.config import ModelConfig, count_parameters, flops_per_token
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.train import memory, recipe
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.hardware import Hardware

GPU_SHARE = 0.8
"""Share of a GPU's memory that a planned micro-batch may fill."""


def describe(
    model: ModelConfig,
    train: TrainConfig,
    *,
    workers: int,
    hardware: Hardware,
    tokens_per_s: float = 0.0,
    num_sequences: int = 0,
) -> dict[str, Any]:
    """The plan as JSON values; memory in bytes of a worker, time in hours.

    Hours follow from ``tokens_per_s``, measured of all workers together, or if that is 0 are
    training FLOPs over ``workers`` times the hardware's peak times its assumed MFU: without
    validation, checkpoints and start-up; None if the peak is not known.
    ``num_sequences`` is that of the dataset's training split, 0 if it is not prepared.
    """
    counts = count_parameters(model)
    size = train.global_batch_size * model.sequence_len
    tokens = train.steps * size
    flops = flops_per_token(model) * tokens
    peak = memory.estimate(model, train, world=workers, on_gpu=hardware.is_gpu)
    rate = workers * hardware.peak(train.precision) * hardware.mfu
    seconds = flops / rate if rate else None
    if tokens_per_s:
        seconds = tokens / tokens_per_s
    accumulation = -(-train.global_batch_size // (workers * train.micro_batch_size))
    passes = train.steps * train.global_batch_size / num_sequences if num_sequences else 0.0
    return {
        "depth": model.n_layer,
        "width": model.n_embd,
        "heads": model.n_head,
        "vocabulary": model.vocab_size,
        "sequence_len": model.sequence_len,
        "parameters": {"total": counts.total, **vars(counts)},
        "tokens": tokens,
        "tokens_per_parameter": tokens / (counts.matrices + counts.head),
        "flops": flops,
        "steps": train.steps,
        "batch": {
            "tokens": size,
            "global_batch_size": train.global_batch_size,
            "micro_batch_size": train.micro_batch_size,
            "gradient_accumulation": accumulation,
        },
        "data": {"sequences": num_sequences, "passes": passes},
        "options": {**_options(model), **_options(train.optim)},
        "learning_rates": train.optim.learning_rates(),
        "weight_decay": train.optim.weight_decay,
        "precision": train.precision,
        "workers": workers,
        "hardware": _describe_hardware(hardware, train),
        "memory": {"total": peak.total, **vars(peak)},
        "measured_tokens_per_s": tokens_per_s,
        "hours": seconds / 3600 if seconds is not None else None,
    }


def fit_micro_batch(
    model: ModelConfig, train: TrainConfig, *, workers: int, hardware: Hardware
) -> TrainConfig:
    """``train`` with the largest micro-batch that a GPU has memory for, up to 2^16 tokens.

    Below that its matmuls are too small to keep it busy. One sequence if nothing fits; on a CPU
    ``train`` as it is, since a larger one gains nothing.
    """
    if not hardware.is_gpu or not hardware.memory:
        return train
    most = max(1, 2**16 // model.sequence_len)
    while True:
        micro = recipe.largest_micro(train.global_batch_size, workers, most)
        variant = dataclasses.replace(train, micro_batch_size=micro)
        peak = memory.estimate(model, variant, world=workers, on_gpu=True)
        if peak.total <= GPU_SHARE * hardware.memory or micro == 1:
            return variant
        most = micro - 1


def render(plan: dict[str, Any]) -> str:
    """``describe``'s object as lines that a person reads."""
    counts, batch, hardware = plan["parameters"], plan["batch"], plan["hardware"]
    rates = ", ".join(
        f"{name.removesuffix('_lr')} {rate:.4g}" for name, rate in plan["learning_rates"].items()
    )
    parts = {name: size for name, size in plan["memory"].items() if name != "total"}
    holds = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    has = f" of {hardware['memory'] / memory.GIB:.0f}" if hardware["memory"] else ""
    many = f"{plan['workers']} × {hardware['name']}"
    kinds = {"blocks": "matrices", "embedding": "embedding", "value embeddings": "value_embedding"}
    speed = (
        f"{hardware['assumed_mfu']:.0%} of {hardware['peak_flops'] / 1e12:,.4g} TFLOP/s each "
        f"(assumed share of the peak in {plan['precision']}; {hardware['peak_source']})"
    )
    if not hardware["peak_flops"]:
        speed = f"a speed that is not known ({hardware['peak_source']})"
    if plan["measured_tokens_per_s"]:
        speed = f"{plan['measured_tokens_per_s']:,.0f} tokens/s of all workers (measured)"
    groups = ", ".join(f"{millions(counts[key])} {name}" for name, key in kinds.items())
    data, many_passes = plan["data"], ""
    if data["passes"] > recipe.MANY_PASSES:
        many_passes = (
            f"\nWARNING: training passes {data['passes']:,.0f} times over {data['sequences']:,} "
            f"sequences; more than {recipe.MANY_PASSES} passes teach little but to recite them: "
            "give more text, or train fewer tokens"
        )
    lines = "\n".join(
        (
            f"model     {plan['depth']} layers, {plan['width']} wide, {plan['heads']} heads, "
            f"vocabulary {plan['vocabulary']:,}, context {plan['sequence_len']:,}: "
            f"{millions(counts['total'])} parameters ({groups}, {millions(counts['head'])} head)",
            f"training  {plan['steps']:,} steps of {batch['tokens']:,} tokens, together "
            f"{millions(plan['tokens'])} ({plan['tokens_per_parameter']:.1f} a parameter of "
            f"blocks and head), {plan['flops']:.2e} FLOPs in {plan['precision']}",
            f"batch     {batch['global_batch_size']} sequences: {plan['workers']} workers, "
            f"micro-batches of {batch['micro_batch_size']}, "
            f"{batch['gradient_accumulation']} gradient accumulation steps",
            *_data_line(data),
            *_options_line(plan["options"]),
            f"lr        {rates}; weight decay {plan['weight_decay']:.3g}",
            f"memory    {gib(plan['memory']['total'])}{has} GiB on each worker: {holds}",
            f"time      {hours(plan['hours'])} on {many}, at {speed}",
        )
    )
    return lines + many_passes


def _data_line(data: dict[str, Any]) -> list[str]:
    if not data["sequences"]:
        return []
    return [f"data      {data['sequences']:,} sequences, {data['passes']:,.2f} passes"]


def _describe_hardware(hardware: Hardware, train: TrainConfig) -> dict[str, Any]:
    return {
        "name": hardware.name,
        "peak_flops": hardware.peak(train.precision),
        "peak_source": hardware.source,
        "assumed_mfu": hardware.mfu,
        "memory": hardware.memory,
    }


def _options(config: ModelConfig | OptimConfig) -> dict[str, bool | str]:
    """The choices that are not the default ones."""
    values = ((f.name, f.default, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {n: v for n, default, v in values if isinstance(default, bool | str) and v != default}


def _options_line(options: dict[str, bool | str]) -> list[str]:
    if not options:
        return []
    names = (
        f"{'' if v else 'no '}{n}" if isinstance(v, bool) else f"{n} {v}"
        for n, v in options.items()
    )
    return [f"options   {', '.join(names)}"]


def gib(size: float) -> str:
    return f"{size / memory.GIB:.2f}" if size < 10 * memory.GIB else f"{size / memory.GIB:.0f}"


def millions(count: float) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def hours(value: float | None) -> str:
    if value is None:
        return "not known"
    if value < 1:
        return f"{value * 60:.1f} minutes"
    return f"{value:.1f} hours" if value < 72 else f"{value / 24:.1f} days"
