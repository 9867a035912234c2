"""Train a base model, or fine-tune one to chat.

    nanochat-ray train --dataset base --run base --depth 4
    nanochat-ray train --stage sft --dataset sft --run chat --parent base
    nanochat-ray train --dataset more --run more --parent base    # continued pre-training
    nanochat-ray train --depth 20 --hardware h100 --workers 8 --plan-only
    torchrun --nproc-per-node 2 -m nanochat_ray train ...         # without Ray; or --no-ray

The last line is one JSON object. Exit status: 0 the run is complete; 75 it was asked to stop
(SIGTERM, Ctrl-C) and left a checkpoint; 2 wrong input; 1 anything else. torchrun's own is 1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from nanochat_ray.checks import check_float, check_int, check_name, require
from nanochat_ray.cli import supervise
from nanochat_ray.cli.flags import EVERYDAY, overrides
from nanochat_ray.model.config import ModelConfig, Preset
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import absolute, default_root
from nanochat_ray.train.config import MAX_INT, TrainConfig, check_flags

if TYPE_CHECKING:
    TrainFlags = dict[str, Any]
    ModelFlags = dict[str, Any]
    OptimFlags = dict[str, Any]
else:
    TrainFlags = overrides(
        TrainConfig,
        omit=("stage", "precision", "optim"),
        derived_fields=("eval_every", "save_every"),
        prefix=False,
    )
    ModelFlags = overrides(ModelConfig, derived_fields=("window_pattern", "backout"))
    OptimFlags = overrides(
        OptimConfig,
        derived_fields=(
            *("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "embedding_beta2"),
            *("weight_decay", "momentum"),
        ),
    )

BASE_FLAGS = ("depth", "preset", "tokens_per_param", "tokens")
"""Fine-tuning takes the model from its parent and the tokens from its dataset."""
SFT_FLAGS = ("epochs",)
MODEL_FLAGS = ("depth", "preset")
"""What a parent has already."""
LEAST = {
    "depth": 1,
    "tokens": 0,
    "batch_tokens": 0,
    "workers": 1,
    "min_workers": 0,
    "threads": 1,
    "restarts": 0,
    "print_every": 1,
}


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds datasets, tokenizers and runs."""
    stage: Literal["base", "sft"] = "base"
    """Pre-training, or fine-tuning to chat."""
    dataset: str = ""
    """Name of a prepared dataset; by default that of the stage."""
    run: str = ""
    """Name of the run; by default "base" or "chat"."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto resumes a run that exists, else starts one."""
    parent: str | None = None
    """Run whose weights this one starts from; for sft by default "base", for base none."""
    depth: int | None = None
    """Layers of a base model, by default 4; all else is derived from it."""
    preset: str | None = None
    """Base model: modern (the default) or classic."""
    tokens_per_param: float | None = None
    """Base: training tokens per parameter of blocks and head; default 12."""
    tokens: int | None = None
    """Base: training tokens; by default they follow tokens_per_param."""
    epochs: float | None = None
    """SFT: passes over the data, by default 1."""
    batch_tokens: int = 0
    """Tokens of the global batch; 0 follows the scaling rule."""
    lr_scale: float = 1.0
    """Factor on every learning rate."""
    cpu_minutes: float | None = None
    """CPU: at most the tokens that take about this many minutes. The speed is measured when the run
    begins; a run that resumes keeps its plan."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU; on a CPU the faster of the two, for sft the parent's."""
    workers: int = 2
    """Processes that train, data-parallel."""
    min_workers: int = 0
    """Ray: continue with at least this many when machines are lost; 0 waits for all."""
    gpus: bool = False
    """One GPU for each worker."""
    threads: int = 1
    """Torch threads of a worker on a CPU."""
    train: TrainFlags = field(
        default_factory=dict,
        metadata={EVERYDAY: ("micro_batch_size", "seed", "save_every", "keep_latest_k")},
    )
    model: ModelFlags = field(default_factory=dict)
    optim: OptimFlags = field(default_factory=dict)
    print_every: int = 10
    """Steps between printed lines."""
    tensorboard: str = ""
    """Folder for TensorBoard's files, on the first worker's machine."""
    wandb: str = ""
    """Project at Weights & Biases."""
    ray: bool = True
    """Train with Ray Train; --no-ray trains in this process (torchrun implies it)."""
    restarts: int = 0
    """Start again at most this many times when the process is killed. Also when it fails after a
    checkpoint, such as with Ray Train's controller. Lost workers restart by themselves."""
    hardware: str = ""
    """Hardware to plan for: h100, h200, a100, cpu; by default this machine's."""
    plan_only: bool = False
    """Print what would be trained and what it would take, and stop."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        for name in ("dataset", "run"):
            if getattr(self, name):
                check_name(name, getattr(self, name))
        if self.parent is not None:
            check_name("parent", self.parent)
        self._check_stage()
        self._check_numbers()
        self._check_configurations()
        if self.hardware:
            from nanochat_ray.train import hardware

            hardware.by_name(self.hardware)
        local_workers = int(os.environ.get("LOCAL_WORLD_SIZE", 0))  # torchrun's
        if self.gpus and not self.plan_only and (local_workers or not self.ray):
            import torch

            require(torch.cuda.is_available(), "gpus", True, "this machine has no CUDA device")
            devices = torch.cuda.device_count()
            rule = f"this machine has {devices} CUDA devices for {local_workers} workers"
            require(local_workers <= devices, "gpus", True, rule)

    @property
    def run_name(self) -> str:
        return self.run or {"base": "base", "sft": "chat"}[self.stage]

    def _check_stage(self) -> None:
        """Raises ValueError for a flag that does not go with the stage or with a parent."""
        other, flags = ("base", BASE_FLAGS) if self.stage == "sft" else ("sft", SFT_FLAGS)
        for name in flags:
            flag = f"--{name.replace('_', '-')}"
            requirement = f"only with --stage {other}"
            require(getattr(self, name) is None, flag, getattr(self, name), requirement)
        for name in MODEL_FLAGS if self.parent is not None else ():
            value, flag = getattr(self, name), f"--{name}"
            require(value is None, flag, value, "not with --parent, which has its own model")
        if self.preset is not None:
            presets = get_args(Preset)
            require(self.preset in presets, "preset", self.preset, " or ".join(presets))

    def _check_numbers(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least, MAX_INT)
        requirement = f"up to the {self.workers} workers"
        require(self.min_workers <= self.workers, "min_workers", self.min_workers, requirement)
        for name in ("tokens_per_param", "epochs", "lr_scale"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), above=True)
        if self.cpu_minutes is not None:
            check_float("cpu_minutes", self.cpu_minutes)

    def _check_configurations(self) -> None:
        """Raises ValueError for a value that no run allows, before a dataset is opened."""
        check_flags(self.train)
        OptimConfig(**self.optim)


def main(args: Args) -> int:
    if args.restarts and not (args.plan_only or supervise.is_child()):
        return supervise.supervise_run(args.restarts, args.storage, args.run_name)
    from nanochat_ray.cli import train_run

    return train_run.run(args)
