"""The configuration of reinforcement learning, beside that of training. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nanochat_ray.checks import check_int, require
from nanochat_ray.config import require_finite
from nanochat_ray.model.config import Precision

Loss = Literal["reinforce", "rloo", "grpo", "dapo", "dr_grpo", "gspo", "cispo"]
Truncation = Literal["wrong", "mask", "grade"]
MAX_LOGPROB_DIFF = 1e-4
"""Default bound in fp32 (measured: rl/BENCHMARKS.md)."""
DEFAULT_TASKS = (
    "chain_sum,min_terms=4,max_terms=4",
    "chain_sum,min_digits=3,max_digits=3",
    "products,min_terms=3,max_terms=3",
    "products,min_digits=3,max_digits=3",
    "basic_arithmetic,min_terms=2,max_terms=3",
    *("chain_sum", "products", "spoken_sums", "spoken_legs", "dialogue", "identity"),
)
"""Five tasks that are harder than what the default fine-tuning shows, and six of those it shows,
which the model would otherwise unlearn."""


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """What is asked, how answers are sampled, and what is learned from them."""

    tasks: tuple[str, ...] = DEFAULT_TASKS
    """Tasks with options, such as chain_sum,min_terms=4; also any data set of reasoning-gym, and
    import paths of own tasks."""
    pool: int = 2000
    """Training questions of each task, at most."""
    questions: int = 24
    """Questions of a step's first round."""
    samples: int = 16
    """Answers to each question: a group."""
    min_groups: int = 8
    """Rounds follow until this many groups have signal: answers with different rewards."""
    max_rounds: int = 4
    """Rounds of a step, at most."""
    max_tokens: int = 96
    """Tokens of an answer, at most; those of the calculator count."""
    temperature: float = 1.0
    """Of the policy: answers are sampled, and log-probabilities trained, at this temperature."""
    loss: Loss = "reinforce"
    """Policy-gradient objective; see rl/losses.py for the formula and the source of each."""
    clip_low: float = 0.2
    """grpo, dapo, dr_grpo, gspo, cispo: the ratio is clipped below 1 minus this."""
    clip_high: float = 0.2
    """The same above 1 plus this; DAPO's clip-higher is 0.28."""
    kl: float = 0.0
    """Coefficient of the divergence from the parent's weights; 0: none."""
    rehearsal: float | None = None
    """Weight of the parent's fine-tuning conversations; 0: none. Their likelihood is a part of the
    loss, so that what no task asks is not unlearned. By default 3 where the storage has them."""
    stale: int = 0
    """1: the answers of a step are sampled while the step before trains, so with weights that are
    one step old, and the loss has the ratio of both policies; 0: with the step's own weights."""
    truncation: Truncation = "wrong"
    """Answers that reach max_tokens: reward 0, or left out of the loss, or graded as they are."""
    grade_threads: int = 1
    """Groups that a rank grades at once. More help where a grader waits, as for a judge over HTTP,
    and is safe to call from several threads."""
    curriculum: bool = True
    """Ask a task more often, the more of its answers are wrong."""
    max_logprob_diff: float | None = None
    """Largest difference between the trainer's and the engine's log-probability of a token before
    the run fails; 0: never. By default 1e-4 in fp32, and 0 in bf16 and with stale weights."""
    eval_questions: int = 32
    """Questions of each task's validation split."""
    eval_samples: int = 4
    """Answers to each of them, sampled as in training."""

    def logprob_bound(self, precision: Precision) -> float:
        """``max_logprob_diff``, or its default; 0: none."""
        if self.max_logprob_diff is not None:
            return self.max_logprob_diff
        return 0.0 if self.stale or precision != "fp32" else MAX_LOGPROB_DIFF

    def __post_init__(self) -> None:
        require_finite(self)
        require(bool(self.tasks), "tasks", self.tasks, "one or more tasks")
        for name in self.tasks:
            require(self.tasks.count(name) == 1, "tasks", name, "each task once")
        for name, least in (
            *(("pool", 1), ("questions", 1), ("samples", 2), ("min_groups", 1)),
            *(("max_rounds", 1), ("max_tokens", 1), ("eval_questions", 1), ("eval_samples", 1)),
            ("grade_threads", 1),
        ):
            check_int(name, getattr(self, name), least)
        for name, kinds in (("loss", get_args(Loss)), ("truncation", get_args(Truncation))):
            require(getattr(self, name) in kinds, name, getattr(self, name), " or ".join(kinds))
        require(0.2 <= self.temperature <= 5, "temperature", self.temperature, "from 0.2 to 5")
        require(self.stale in (0, 1), "stale", self.stale, "0 or 1")
        require(0 <= self.clip_low <= 1, "clip_low", self.clip_low, "from 0 to 1")
        for name in ("clip_high", "kl"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        weight = self.rehearsal
        require(weight is None or weight >= 0, "rehearsal", weight, "0 (none) or more")
        bound = self.max_logprob_diff
        require(bound is None or bound >= 0, "max_logprob_diff", bound, "0 (never) or more")
