"""Let a chat model learn from its own answers to questions that a program grades.

    nanochat-ray rl --parent chat --run rl --steps 60
    nanochat-ray rl --tasks chain_sum,min_terms=4 my_package.my_tasks.Riddles --rl.samples 8
    nanochat-ray rl --tasks gsm8k,path=/data/gsm8k --rl.max-tokens 256
    torchrun --nproc-per-node 2 -m nanochat_ray rl ...            # without Ray; or --no-ray

A task is a name with options: those of nanochat-ray prepare, any data set of reasoning-gym, or the
import path of your own. The last line is one JSON object. Exit status: as nanochat-ray train.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from nanochat_ray.checks import check_float, check_int, check_name, require
from nanochat_ray.cli import supervise
from nanochat_ray.cli.flags import EVERYDAY, overrides
from nanochat_ray.engine.config import GUEST_DEFAULTS, EngineConfig
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.rl.config import DEFAULT_TASKS, RLConfig
from nanochat_ray.storage import Store, absolute, default_root
from nanochat_ray.train.config import MAX_INT, TrainConfig, check_flags

if TYPE_CHECKING:
    from nanochat_ray.train.config import TrainerConfig

    RLFlags = dict[str, Any]
    TrainFlags = dict[str, Any]
    OptimFlags = dict[str, Any]
    EngineFlags = dict[str, Any]
else:
    RLFlags = overrides(RLConfig, omit=("tasks", "stale"))
    TrainFlags = overrides(
        TrainConfig,
        omit=(
            *("stage", "steps", "precision", "optim", "global_batch_size", "eval_sequences"),
            *("compile", "fp8"),
        ),
        derived_fields=("micro_batch_size", "eval_every", "save_every"),
        prefix=False,
    )
    OptimFlags = overrides(
        OptimConfig,
        derived_fields=(
            *("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "embedding_beta2"),
            "momentum",
        ),
    )
    EngineFlags = overrides(EngineConfig, omit=("precision", "max_model_len"))


MOST_ENGINES = 4
"""By default: a round's answers are too few to keep more of them busy to its end."""


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds the runs."""
    parent: str = "chat"
    """Run whose weights this one starts from: a chat model."""
    run: str = "rl"
    """Name of the run."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto resumes a run that exists, else starts one."""
    tasks: tuple[str, ...] = DEFAULT_TASKS
    """Tasks with options, such as chain_sum,min_terms=4."""
    steps: int = 60
    """Optimizer steps."""
    stale: Literal[0, 1] = 0
    """1: a step's answers are sampled while the step before trains; 0: by its own weights."""
    lr_scale: float = 1.0
    """Factor on every learning rate; 1 is a tenth of the parent's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of trainer and engine; that their log-probabilities agree is asserted in fp32 alone."""
    engines: int = 0
    """Ray: engines that sample, each an actor; 0: 1 with --gpus, else one for each core up to 4."""
    endpoint: str = ""
    """Ray: a Serve application whose replicas sample. They do so in the time that users leave, in
    place of --engines; what they serve does not change. nanochat-ray serve starts "nanochat"."""
    workers: int = 1
    """Ray: processes that train, data-parallel."""
    threads: int = 0
    """Torch threads of each engine and worker on a CPU; 0 is its share of all cores but one."""
    gpus: bool = False
    """A GPU for each engine and each worker; with --no-ray one for both."""
    rl: RLFlags = field(
        default_factory=dict,
        metadata={EVERYDAY: ("questions", "samples", "max_tokens", "rehearsal")},
    )
    train: TrainFlags = field(
        default_factory=dict,
        metadata={EVERYDAY: ("seed", "eval_every", "save_every")},
    )
    optim: OptimFlags = field(default_factory=dict)
    engine: EngineFlags = field(default_factory=dict)
    print_every: int = 1
    """Steps between printed lines."""
    tensorboard: str = ""
    """Folder for TensorBoard's files."""
    wandb: str = ""
    """Project at Weights & Biases."""
    ray: bool = True
    """Engines and trainer on Ray; --no-ray runs both in this process, in turns."""
    restarts: int = 0
    """Start again at most this many times when the process is killed. Also when it fails after a
    checkpoint, such as with Ray Train's controller. Lost engines and workers restart by
    themselves."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("run", self.run)
        check_name("parent", self.parent)
        require(self.run != self.parent, "run", self.run, "another run than --parent")
        for name, least in (
            *(("steps", 1), ("engines", 0), ("workers", 1), ("threads", 0), ("restarts", 0)),
            ("print_every", 1),
        ):
            check_int(name, getattr(self, name), least, MAX_INT)
        check_float("lr_scale", self.lr_scale, above=True)
        if self.endpoint:
            require(not self.engines, "engines", self.engines, "not with --endpoint")
        check_flags(self.train)
        OptimConfig(**self.optim)
        engine_config(self)

    def rl_config(self) -> RLConfig:
        return RLConfig(tasks=self.tasks, stale=self.stale, **self.rl)


def engine_config(args: Args) -> EngineConfig:
    """Larger batches than for serving, where the first token must not wait, unless they share the
    engines of an endpoint."""
    rollouts = args.rl_config().questions * args.rl_config().samples
    sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 512}
    if args.endpoint:
        sizes = GUEST_DEFAULTS["cuda" if args.gpus else "cpu"]
    defaults = {
        **sizes,
        "max_num_seqs": min(sizes["max_num_seqs"], rollouts),
        "prefill_chunk": 512,
        "max_queue_size": 1024,
        "max_queue_s": 0.0,
    }
    return EngineConfig(**{**defaults, **args.engine}, precision=args.precision)


def check_here(args: Args) -> None:
    """ValueError for flags that need Ray, or a GPU that this machine does not have."""
    for name, default in (("endpoint", ""), ("engines", 0), ("workers", 1)):
        rule = "only on Ray: without it each process has one engine, and torchrun starts several"
        require(getattr(args, name) == default, name, getattr(args, name), rule)
    if args.gpus:
        import torch

        require(not args.stale, "stale", 1, "only on Ray: one GPU has nothing to overlap")
        require(torch.cuda.is_available(), "gpus", True, "this machine has no CUDA device")


def build(args: Args) -> TrainerConfig:
    """The job that the flags describe. ValueError if the parent or the run does not fit it."""
    from nanochat_ray import config as configs
    from nanochat_ray.checkpoint import checkpoint
    from nanochat_ray.rl.parent import describe, load_tokenizer
    from nanochat_ray.train import preflight, recipe
    from nanochat_ray.train.config import TrainerConfig
    from nanochat_ray.train.identity import STAGE_CONFIG

    run = Store.at(args.storage).child("runs", args.parent)
    if checkpoint.latest(run) is None:
        raise ValueError(f"parent={args.parent!r} has no checkpoint in {args.storage}")
    model, trainer = checkpoint.load_config(run).model, checkpoint.load_trainer(run)
    before = trainer.get("train_config", {})
    rule = "a chat model; this is a base model: fine-tune it first, nanochat-ray train --stage sft"
    require(before.get("stage") != "base", "parent", args.parent, rule)
    rl = args.rl_config()
    train = recipe.rl_config(
        model,
        configs.from_json(OptimConfig, before["optim"]) if before.get("stage") == "sft" else None,
        steps=args.steps,
        rollouts=rl.questions * rl.samples * rl.max_rounds,
        precision=args.precision,
        micro_batch_size=args.train.get("micro_batch_size", 0),
    )
    optim = replace(train.optim.with_scaled_lr(args.lr_scale), **args.optim)
    config = TrainerConfig(
        storage=args.storage,
        dataset="",
        run=args.run,
        model=model,
        train=replace(train, **args.train, optim=optim),
        parent=args.parent,
        tensorboard=args.tensorboard,
        wandb=args.wandb,
    )
    tokenizer = load_tokenizer(config)
    if not supervise.continues_run():
        preflight.check_resume(args.storage, args.run, args.resume)
    about = describe(config, rl)
    if int(os.environ.get("RANK", 0)) == 0:
        print(rehearsal_line(about[STAGE_CONFIG]["rehearsal_dataset"]), flush=True)
    return preflight.check_run(config, tokenizer, about)


def run_here(config: TrainerConfig, args: Args) -> dict[str, Any]:
    """In this process, or as one rank of ``torchrun``, each with an engine."""
    import torch

    from nanochat_ray.cli.train_run import train_here
    from nanochat_ray.machine import engine_threads
    from nanochat_ray.rl.source import RolloutSource

    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(args.threads or engine_threads(sharing=sharing))
    source = RolloutSource(config, args.rl_config(), engine_config(args))
    return train_here(config, source=source, gpus=args.gpus, print_every=args.print_every)


def run_on_ray(config: TrainerConfig, args: Args) -> dict[str, Any]:
    from nanochat_ray.container import cores
    from nanochat_ray.machine import engine_threads
    from nanochat_ray.on_ray import session
    from nanochat_ray.on_ray.fleet import num_replicas
    from nanochat_ray.on_ray.rl import fit_rl

    session.connect()
    if args.endpoint:
        engines = num_replicas(args.endpoint)
    else:
        engines = args.engines or (1 if args.gpus else min(MOST_ENGINES, cores()))
    gpus = args.workers + (0 if args.endpoint else engines)
    session.check_gpus(gpus if args.gpus else 0)
    return fit_rl(
        config,
        args.rl_config(),
        engine_config(args),
        engines=engines,
        endpoint=args.endpoint,
        workers=args.workers,
        gpus=args.gpus,
        # Engines and workers take turns.
        threads=args.threads or engine_threads(sharing=max(engines, args.workers)),
        print_every=args.print_every,
    )


def rehearsal_line(dataset: str | None) -> str:
    if dataset:
        return f"rehearsing the conversations of dataset {dataset}"
    return "no conversations are rehearsed: what is not asked may be unlearned"


def gain_lines(result: dict[str, Any], tasks: tuple[str, ...]) -> list[str]:
    """pass@1 of each task and of all, before the first step and after the last."""
    names = {f"pass@1/{task}": task for task in tasks} | {"pass@1": "mean of the tasks"}
    lines = [
        f"  {names[key]:<44} {result[f'first_{key}']:6.1%} → {result[key]:6.1%}"
        for key in names
        if key in result and f"first_{key}" in result
    ]
    return ["pass@1 on new questions, before → after", *lines] if lines else []


def main(args: Args) -> int:
    if args.restarts and not supervise.is_child():
        return supervise.supervise_run(args.restarts, args.storage, args.run)
    from nanochat_ray.cli.train_job import under_torchrun
    from nanochat_ray.cli.train_run import process_group
    from nanochat_ray.train.stop import STOPPED

    here = under_torchrun() or not args.ray
    if here:
        check_here(args)
    with process_group(gpus=args.gpus):
        config = build(args)
        result = run_here(config, args) if here else run_on_ray(config, args)
    if int(os.environ.get("RANK", 0)) == 0:
        print(*gain_lines(result, args.tasks), sep="\n")
        print(json.dumps({"run": config.run, **result}))
    return 0 if result["done"] else STOPPED
