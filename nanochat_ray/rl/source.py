"""Batches of answers that the model in training has sampled: the source of an RL run.

Step k asks the next questions, samples a group of answers to each with the weights of step k,
grades them, and trains on the groups whose rewards differ. Ranks share the questions; every rank
knows all rewards. Equal answers of a group are one sequence whose weight is their number.

With ``RLConfig.stale`` a thread samples for step k + 1, with the weights of step k, while step k
trains. A checkpoint waits for these answers and holds them, so a run that resumes has the same
schedule of versions as one that was never stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.offline import LocalEngine, OfflineEngine
from nanochat_ray.evals.answers import answer_text
from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl import parent
from nanochat_ray.rl.batch import make_batch
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.figures import step_figures, validation_figures
from nanochat_ray.rl.losses import PolicyLoss
from nanochat_ray.rl.questions import Curriculum, QuestionSet, questions_needed
from nanochat_ray.rl.rehearsal import Rehearsal
from nanochat_ray.rl.rollout import Group, GroupSampler
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.step import Batch, Objective

MAX_STEPS_WITHOUT_REWARD = 10
"""Consecutive steps without one right answer before the run gives up."""
EVAL_STEP = -1
"""Stands for the step in the seeds of validation, whose samples differ by the weights alone."""


class StepRollouts(NamedTuple):
    """All groups of a step, the same on all ranks, and the seconds that this rank sampled them."""

    groups: list[Group]
    seconds: float

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Self:
        groups, seconds = values
        return cls([Group.from_json(group) for group in groups], seconds)


class RolloutSource:
    """Implements ``train.source.Source``."""

    on_policy = True
    bytes_per_token = 0.0

    def __init__(
        self,
        config: TrainerConfig,
        rl: RLConfig,
        engine: EngineConfig,
        make_engine: Callable[[GPT, Tokenizer, EngineConfig], OfflineEngine] = (
            LocalEngine.from_model
        ),
    ):
        """``make_engine`` is called once, when the model is there."""
        self.config, self.rl, self.engine_config = config, rl, engine
        self._make_engine = make_engine
        self._version = self._steps_without_reward = 0
        self._last_groups: list[Group] = []
        self._ahead: Future[StepRollouts] | None = None
        """Stale: the rollouts of the step after the one that trains."""

    def setup(self, model: GPT, ranks: Ranks) -> None:
        config, rl, seed = self.config, self.rl, self.config.train.seed
        self.model, self.tokenizer = model, parent.load_tokenizer(config)
        if ranks.device.type == "cpu" and model.compute_dtype == torch.float32:
            model.use_float64_attention()
        self.questions = QuestionSet(rl.tasks, "train", rl.pool, seed, self.tokenizer)
        self.val_questions = QuestionSet(rl.tasks, "val", rl.eval_questions, seed, self.tokenizer)
        longest = max(self.questions.longest, self.val_questions.longest)
        room = model.config.sequence_len - longest
        if room < rl.max_tokens:
            raise ValueError(
                f"max_tokens={rl.max_tokens} is not allowed: the longest question has {longest} "
                f"tokens, which leaves {room} of sequence_len={model.config.sequence_len}"
            )
        self.curriculum = Curriculum(self.questions.sizes, seed, adaptive=rl.curriculum)
        self.rehearsal = Rehearsal.open(config, self.tokenizer)
        self.engine = self._make_engine(model, self.tokenizer, self.engine_config)
        # Stale answers are exchanged while a step trains: not in the order of its collectives.
        self.ranks = Ranks() if rl.stale else ranks
        self.sampler = GroupSampler(rl, self.tokenizer, self.engine, self.ranks, seed)
        self.objective: Objective = PolicyLoss(
            rl,
            ranks,
            max_diff=rl.logprob_bound(config.train.precision),
            reference=parent.load_reference(config, model.compute_dtype, ranks.device)
            if rl.kl
            else None,
        )

    def identity(self) -> Mapping[str, Any]:
        return parent.describe(self.config, self.rl)

    def state(self) -> dict[str, Any]:
        """Waits for rollouts that are in flight, which later steps depend on."""
        return {
            "curriculum": self.curriculum.state(),
            "steps_without_reward": self._steps_without_reward,
            "ahead": None if self._ahead is None else self._ahead.result(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.curriculum.load_state(state["curriculum"])
        self._steps_without_reward = int(state["steps_without_reward"])
        if (rollouts := state.get("ahead")) is not None:
            self._ahead = Future()
            self._ahead.set_result(StepRollouts.from_json(rollouts))

    # --- training -------------------------------------------------------------------------------

    def batches(self, start: int) -> Iterator[Batch]:
        self._version = start
        with ThreadPoolExecutor(1, thread_name_prefix="rollouts") as thread:
            for step in range(start, self.config.train.steps):
                rollouts = self._take(step)
                if self.rl.stale and step + 1 < self.config.train.steps:
                    self.engine.load(step, self.model.state_dict())
                    self._ahead = thread.submit(self._sample, step + 1)
                self._version = step + 1  # that of the weights when the next method is called
                yield self._make_batch(step, rollouts)

    def _make_batch(self, step: int, rollouts: StepRollouts) -> Batch:
        groups, seconds = rollouts
        batch = make_batch(
            groups,
            self.rl,
            self.rehearsal.conversations(step),
            self.rehearsal.weight,
            micro_batch_size=self.config.train.micro_batch_size,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        figures = step_figures(groups, self.rl.tasks, seconds)
        return dataclasses.replace(batch, metrics={**figures, **batch.metrics})

    def _take(self, step: int) -> StepRollouts:
        """The rollouts that ``step`` trains on; step 0 is always on-policy."""
        if self._ahead is not None:
            rollouts, self._ahead = self._ahead.result(), None
            return rollouts
        self.engine.load(step, self.model.state_dict())
        return self._sample(step)

    def _sample(self, step: int) -> StepRollouts:
        """All rounds of a step."""
        begin = time.perf_counter()
        groups: list[Group] = []
        for _ in range(self.rl.max_rounds):
            count = questions_needed(self.rl, len(groups), sum(g.has_signal for g in groups))
            if not count:
                break
            questions = self.curriculum.draw(count)
            new_groups = self.sampler.sample(
                self.questions, questions, samples=self.rl.samples, step=step, first=len(groups)
            )
            self.curriculum.observe(questions, [group.reward for group in new_groups])
            groups += new_groups
        version = max(0, step - self.rl.stale)
        assert all(r.version == version for group in groups for r in group.rollouts)
        self._check_rewards(groups)
        return StepRollouts(groups, time.perf_counter() - begin)

    def _check_rewards(self, groups: Sequence[Group]) -> None:
        """ValueError after too many steps without a right answer."""
        is_hopeless = not any(group.has_signal or max(group.rewards) > 0 for group in groups)
        self._steps_without_reward = self._steps_without_reward + 1 if is_hopeless else 0
        if self._steps_without_reward < MAX_STEPS_WITHOUT_REWARD:
            return
        reason = (
            f"tasks={list(self.rl.tasks)}: no answer of the last {MAX_STEPS_WITHOUT_REWARD} steps "
            "is right, so there is nothing to learn from"
        )
        share = np.mean([r.is_truncated for group in groups for r in group.rollouts])
        if self.rl.truncation == "wrong" and share > 0.5:
            reason += f": max_tokens={self.rl.max_tokens} cuts {share:.0%} of them"
        raise ValueError(f"{reason}; fine-tune on these tasks first, or choose easier ones")

    # --- validation -----------------------------------------------------------------------------

    def evaluate(self, model: GPT) -> dict[str, float]:
        """``validation_figures`` of every question of the validation split."""
        if self._ahead is not None:
            self._ahead.result()  # the engines sample with other weights
        self.engine.load(self._version, model.state_dict())
        self._last_groups = self.sampler.sample(
            self.val_questions,
            self.val_questions.every_question(),
            samples=self.rl.eval_samples,
            step=EVAL_STEP,
        )
        return validation_figures(self._last_groups, self.rl.tasks)

    def samples(self, model: GPT) -> list[dict[str, Any]]:
        """The first answer of the last validation to a question of each task, with its reward."""
        first_groups = {group.question.task: group for group in reversed(self._last_groups)}
        return [
            {
                "prompt": str(task.question(group.question.example)[-1]["content"]),
                "text": answer_text(self.tokenizer, group.rollouts[0].tokens, shows_tools=True),
                "reward": group.rewards[0],
            }
            for task, (_, group) in zip(
                self.val_questions.tasks, sorted(first_groups.items()), strict=True
            )
        ]
