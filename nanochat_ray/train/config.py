"""The configuration of one stage of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nanochat_ray.checks import require
from nanochat_ray.config import require_finite
from nanochat_ray.model.config import Precision
from nanochat_ray.optim.config import OptimConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage of training: what is trained, on how much, and when it is looked at."""

    stage: Literal["base", "sft"] = "base"
    steps: int
    global_batch_size: int
    """Rows of the global batch, whatever the number of workers."""
    micro_batch_size: int
    """Rows of one forward and backward pass of one worker."""
    seed: int = 0
    precision: Precision = "fp32"
    optim: OptimConfig = field(default_factory=OptimConfig)
    fp8: bool = False
    """The blocks' large matrix products in 8-bit floating point (Hopper; bf16 for the rest)."""
    compile: bool = False
    """Compile the forward pass (torch.compile): pays on a GPU; on a CPU it gained nothing."""
    window_warmup: float = 0.0
    """Share of the steps in which attention windows grow, in three stages, to their full size."""
    eval_every: int = 0
    """Steps between validations; 0 validates only at the first and last step."""
    eval_sequences: int = 256
    """Validation rows that are looked at, at most."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep_latest_k: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Also save where a validation is the best so far, and keep that checkpoint."""
    checkpoint_activations: bool = False
    """Keep only the inputs of blocks and compute the rest again in the backward pass (Chen et al.,
    arXiv 1604.06174): a third more work for a fraction of the memory."""
    deterministic: bool = False
    """Only operations whose result is the same bits each time; slower on a GPU."""
    spike_clip: float = 0.0
    """A gradient norm above this many times the median of the last 100 is cut down to that; 0 is
    off."""
    sample_tokens: int = 48
    """Tokens of the texts that are written at each validation, for a person to read; 0 is none."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("steps", "global_batch_size", "micro_batch_size", "keep_latest_k"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number from 1")
        for name in ("eval_every", "save_every", "eval_sequences", "sample_tokens"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.precision in ("fp32", "bf16"), "precision", self.precision, "fp32 or bf16")
        require(self.stage in ("base", "sft"), "stage", self.stage, "base or sft")
        require(not self.fp8 or self.precision == "bf16", "fp8", self.fp8, "only in bf16")
        require(0 <= self.window_warmup <= 1, "window_warmup", self.window_warmup, "from 0 to 1")
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
