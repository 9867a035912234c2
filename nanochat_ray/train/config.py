"""The configuration of one stage of training, and of the run that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from nanochat_ray.checks import check_float, check_int, check_name, require
from nanochat_ray.config import from_json, require_finite, to_json
from nanochat_ray.model.config import ModelConfig, Precision
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import absolute

Stage = Literal["base", "sft", "rl"]
Compile = Literal["auto", "on", "off"]
MAX_INT = 2**62
"""Of any number of a command's flags."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage of training: how it steps, and when it is validated and saved."""

    stage: Stage = "base"
    steps: int
    """Optimizer steps of the whole run."""
    global_batch_size: int
    """Sequences of the global batch, whatever the number of workers."""
    micro_batch_size: int
    """Sequences of one forward and backward pass of one worker."""
    seed: int = 0
    """Seed of fresh weights, the data order and dropout."""
    precision: Precision = "fp32"
    optim: OptimConfig = field(default_factory=OptimConfig)
    fp8: bool = False
    """The blocks' large matmuls in 8-bit floating point (Hopper; bf16 for the rest)."""
    compile: Compile = "auto"
    """Compile the layers (torch.compile). auto: on a GPU; on a CPU it gained nothing."""
    window_warmup: float = 0.0
    """Share of the steps in which attention windows grow, in three stages, to their full size."""
    eval_every: int = 0
    """Steps between validations; 0 validates only at the first and last step."""
    eval_sequences: int = 256
    """Sequences of the validation split that are evaluated, at most."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep_latest_k: int = 2
    """Number of newest checkpoints that are kept."""
    keep_best: bool = True
    """Also save where a validation is the best so far, and keep that checkpoint."""
    save_timeout_s: float = 600.0
    """Seconds for which a run waits at its end for storage that fails, before it ends with an
    error. Until then it continues, and a checkpoint that cannot be written is tried again."""
    checkpoint_activations: bool = False
    """Keep only the inputs of blocks and recompute the rest in the backward pass (Chen et al.,
    arXiv 1604.06174): a third more work for a fraction of the memory."""
    deterministic: bool = False
    """Only operations whose result is bitwise identical each time; slower on a GPU."""
    spike_clip: float = 0.0
    """Gradient-spike clipping: the largest gradient norm, as a multiple of the median of the last
    100; 0 is off."""
    sample_tokens: int = 48
    """Tokens of the samples that are generated at each validation, for a person to read; 0 is
    none."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("steps", "global_batch_size", "micro_batch_size", "keep_latest_k"):
            check_int(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every", "eval_sequences", "sample_tokens"):
            check_int(name, getattr(self, name), 0)
        for name, kinds in (
            ("precision", get_args(Precision)),
            ("stage", get_args(Stage)),
            ("compile", get_args(Compile)),
        ):
            require(getattr(self, name) in kinds, name, getattr(self, name), " or ".join(kinds))
        require(not self.fp8 or self.precision == "bf16", "fp8", self.fp8, "only in bf16")
        # Uncompiled, the casts of a matrix take longer than its matmul saves.
        require(not self.fp8 or self.compile != "off", "fp8", self.fp8, "not with compile=off")
        if self.stage == "rl":
            rule = "not in RL, whose micro-batches have any number of tokens"
            require(not self.fp8, "fp8", self.fp8, rule)
            require(self.compile != "on", "compile", self.compile, rule)
        check_float("window_warmup", self.window_warmup, 0, 1)
        check_float("save_timeout_s", self.save_timeout_s)
        require(
            self.spike_clip == 0 or self.spike_clip > 1,
            "spike_clip",
            self.spike_clip,
            "0 (off) or more than 1",
        )
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            "global_batch_size",
            self.global_batch_size,
            f"a multiple of micro_batch_size={self.micro_batch_size}",
        )


def check_flags(values: Mapping[str, Any]) -> None:
    """ValueError for a field of ``TrainConfig``, as a command's flags have it, that no run has."""
    for name, value in values.items():
        if type(value) is int:
            check_int(name, value, 0, MAX_INT)
    micro_batch_size = values.get("micro_batch_size", 1)
    least = {"steps": 1, "global_batch_size": micro_batch_size, "micro_batch_size": 1}
    TrainConfig(**{**least, "precision": "bf16", **values})


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What a run trains, on what data, and where it is stored.

    Names of runs and datasets are folders under ``storage``.
    """

    storage: str
    dataset: str
    """Empty for reinforcement learning."""
    run: str
    model: ModelConfig
    train: TrainConfig
    parent: str = ""
    """Run whose weights this one starts from; empty starts from random weights."""
    tensorboard: str = ""
    """Folder on rank 0's machine for TensorBoard's files; empty writes none."""
    wandb: str = ""
    """Project at Weights & Biases to log to; empty is none."""
    about: dict[str, Any] = field(default_factory=dict)
    """Facts that the run's checkpoints store: data and parent (``identity.describe``), ..."""

    def __post_init__(self) -> None:
        # Ray Train's workers have a working directory of their own.
        object.__setattr__(self, "storage", absolute(self.storage))
        if self.train.stage != "rl":
            check_name("dataset", self.dataset)
        check_name("run", self.run)
        if self.parent:
            check_name("parent", self.parent)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainerConfig:
        return cls(
            **{
                **values,
                "model": from_json(ModelConfig, values["model"]),
                "train": from_json(TrainConfig, values["train"]),
            }
        )
