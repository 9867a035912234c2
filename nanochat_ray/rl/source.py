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
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np

from nanochat_ray import config as configs
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.offline import LocalEngine, OfflineEngine
from nanochat_ray.engine.request import SamplingParams
from nanochat_ray.evals.answers import answer_params, answer_text
from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl.batch import Group, make_batch
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.losses import PolicyLoss
from nanochat_ray.rl.questions import Curriculum, Question, content_digest, prompts
from nanochat_ray.rl.rehearsal import Rehearsal
from nanochat_ray.rl.rehearsal import describe as describe_rehearsal
from nanochat_ray.rl.rollout import Rollout, make_requests, rollout_seed, sample_rollouts
from nanochat_ray.storage import Store
from nanochat_ray.tasks.registry import make_task
from nanochat_ray.tasks.task import Split, Task
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import identity
from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.step import Batch, Objective

MAX_LOGPROB_DIFF = 1e-4
"""Default bound in fp32; measured: 6e-5 at most (rl/BENCHMARKS.md)."""
MAX_STEPS_WITHOUT_REWARD = 10
"""Consecutive steps without one right answer before the run gives up."""
EVAL_STEP = -1
"""Stands for the step in the seeds of validation, whose samples differ by the weights alone."""


def tokenizer_run(config: TrainerConfig) -> Store:
    """The run, or its parent where it has not begun."""
    runs = Store.at(config.storage).child("runs")
    run = runs.child(config.run)
    return run if checkpoint.latest(run) else runs.child(config.parent)


def load_tokenizer(config: TrainerConfig) -> Tokenizer:
    return checkpoint.load_tokenizer(tokenizer_run(config))


def make_tasks(config: RLConfig, split: Split, size: int, seed: int) -> list[Task]:
    """ValueError for a task that is unknown or has no questions in the split."""
    tasks = [make_task(name, split, size=size, seed=seed) for name in config.tasks]
    for name, task in zip(config.tasks, tasks, strict=True):
        if not len(task):
            raise ValueError(f"tasks={name!r} has no questions in the split {split}")
    return tasks


def describe(config: TrainerConfig, rl: RLConfig) -> dict[str, Any]:
    """What a checkpoint's ``about`` holds of an RL run: its questions and what it rehearses by
    content, its parent, and its configuration. ValueError if there is nothing to rehearse."""
    tasks, root = make_tasks(rl, "train", rl.pool, config.train.seed), Store.at(config.storage)
    rehearsal = describe_rehearsal(
        root, tokenizer_run(config), load_tokenizer(config), rl.rehearsal
    )
    return {
        "dataset": "questions",
        "dataset_digest": content_digest(tasks),
        **identity.describe_parent(root, config.parent),
        identity.STAGE_CONFIG: configs.to_json(rl) | rehearsal,
    }


def sampling_params(rl: RLConfig, tokenizer: Tokenizer) -> SamplingParams:
    """Of answers to train on: with the log-probabilities of the distribution that is sampled."""
    return answer_params(
        tokenizer,
        temperature=rl.temperature,
        max_tokens=rl.max_tokens,
        logprobs=0,
        logprobs_mode="processed_logprobs",
    )


def questions_needed(config: RLConfig, num_groups: int, num_with_signal: int) -> int:
    """Questions of the next round: as many as will give the missing groups with signal, if as many
    of them have it as of those so far."""
    missing = config.min_groups - num_with_signal
    if not num_groups or missing <= 0:
        return 0 if num_groups else config.questions
    share = max(1, num_with_signal) / num_groups
    return min(config.questions, math.ceil(missing / share))


class StepRollouts(NamedTuple):
    """All groups of a step, the same on all ranks, and the seconds that this rank sampled them."""

    groups: list[Group]
    seconds: float

    def to_wire(self) -> list[Any]:
        return [[group.to_wire() for group in self.groups], self.seconds]

    @classmethod
    def from_wire(cls, wire: Sequence[Any], prompts: Sequence[Sequence[Sequence[int]]]) -> Self:
        groups, seconds = wire
        return cls([Group.from_wire(group, prompts) for group in groups], seconds)


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
        seed = config.train.seed
        self.tasks = make_tasks(rl, "train", rl.pool, seed)
        self.val_tasks = make_tasks(rl, "val", rl.eval_questions, seed)
        sizes = [len(task) for task in self.tasks]
        self.curriculum = Curriculum(sizes, seed, adaptive=rl.curriculum)
        self._version = self._steps_without_reward = 0
        self._last_groups: list[Group] = []
        self._ahead: Future[StepRollouts] | None = None
        """Stale: the rollouts of the step after the one that trains."""

    def setup(self, model: GPT, ranks: Ranks) -> None:
        self.model = model
        # Answers are exchanged while a step trains: not in the order of its collectives.
        self.ranks = Ranks() if self.rl.stale else ranks
        self.tokenizer = load_tokenizer(self.config)
        self.prompts = prompts(self.tasks, self.tokenizer)
        self.val_prompts = prompts(self.val_tasks, self.tokenizer)
        longest = max(len(p) for task in (*self.prompts, *self.val_prompts) for p in task)
        room = model.config.sequence_len - longest
        if room < self.rl.max_tokens:
            raise ValueError(
                f"max_tokens={self.rl.max_tokens} is not allowed: the longest question has "
                f"{longest} tokens, which leaves {room} of sequence_len="
                f"{model.config.sequence_len}"
            )
        self.sampling_params = sampling_params(self.rl, self.tokenizer)
        self.engine = self._make_engine(model, self.tokenizer, self.engine_config)
        max_diff = self.rl.max_logprob_diff
        if max_diff is None:
            on_policy = not self.rl.stale and self.config.train.precision == "fp32"
            max_diff = MAX_LOGPROB_DIFF if on_policy else 0.0
        reference = self._reference(model).to(ranks.device) if self.rl.kl else None
        self._set_up_rehearsal(model.config.sequence_len + 1)
        self.objective: Objective = PolicyLoss(
            self.rl, max_diff=max_diff, device=ranks.device, reference=reference
        )

    def _set_up_rehearsal(self, max_len: int) -> None:
        """As the checkpoints of the run describe it."""
        about = self.config.about[identity.STAGE_CONFIG]
        self.rl = dataclasses.replace(self.rl, rehearsal=about["rehearsal"] or 0.0)
        self.rehearsal = None
        if name := about["rehearsal_dataset"]:
            self.rehearsal = Rehearsal.open(
                Store.at(self.config.storage),
                name,
                self.tokenizer,
                seed=self.config.train.seed,
                max_len=max_len,
            )

    def _reference(self, model: GPT) -> GPT:
        """The parent, whose weights the policy started from."""
        root, name = Store.at(self.config.storage), self.config.about.get("parent_checkpoint")
        parent = checkpoint.load(root.child("runs", self.config.parent), name, optimizer=False)
        reference = GPT(model.config, compute_dtype=model.compute_dtype)
        reference.load_state_dict(parent.weights)
        return reference.eval().requires_grad_(False)

    def identity(self) -> Mapping[str, Any]:
        return describe(self.config, self.rl)

    def state(self) -> dict[str, Any]:
        """Waits for rollouts that are in flight, which later steps depend on."""
        ahead = None if self._ahead is None else self._ahead.result().to_wire()
        return {
            "curriculum": self.curriculum.state(),
            "steps_without_reward": self._steps_without_reward,
            "ahead": ahead,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.curriculum.load_state(state["curriculum"])
        self._steps_without_reward = int(state["steps_without_reward"])
        if (wire := state.get("ahead")) is not None:
            self._ahead = Future()
            self._ahead.set_result(StepRollouts.from_wire(wire, self.prompts))

    # --- training -------------------------------------------------------------------------------

    def batches(self, start: int) -> Iterator[Batch]:
        self._version = start
        train, ranks = self.config.train, self.ranks
        with ThreadPoolExecutor(1, thread_name_prefix="rollouts") as thread:
            for step in range(start, train.steps):
                rollouts = self._take(step)
                if self.rl.stale and step + 1 < train.steps:
                    self.engine.load(step, self.model.state_dict())
                    self._ahead = thread.submit(self._sample, step + 1)
                self._version = step + 1  # that of the weights when the next method is called
                yield make_batch(
                    rollouts.groups,
                    self.rl,
                    rollouts.seconds,
                    conversations=self.rehearsal.conversations(step) if self.rehearsal else (),
                    micro_batch_size=train.micro_batch_size,
                    rank=ranks.rank,
                    world=ranks.world,
                )

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
            questions, first = self.curriculum.draw(count), len(groups)
            new = self._ask(self.tasks, self.prompts, questions, self.rl.samples, step, first)
            self.curriculum.observe(questions, [float(group.rewards.mean()) for group in new])
            groups += new
        version = max(0, step - self.rl.stale)
        assert all(r.version == version for group in groups for r in group.rollouts)
        self._check_rewards(groups)
        return StepRollouts(groups, time.perf_counter() - begin)

    def _check_rewards(self, groups: Sequence[Group]) -> None:
        """ValueError after too many steps without a right answer."""
        is_hopeless = all(group.rewards.max() <= 0 for group in groups)
        self._steps_without_reward = self._steps_without_reward + 1 if is_hopeless else 0
        if self._steps_without_reward >= MAX_STEPS_WITHOUT_REWARD:
            raise ValueError(
                f"tasks={list(self.rl.tasks)}: no answer of the last {MAX_STEPS_WITHOUT_REWARD} "
                "steps is right, so there is nothing to learn from; fine-tune on these tasks "
                "first, or choose easier ones"
            )

    def _ask(
        self,
        tasks: Sequence[Task],
        task_prompts: Sequence[Sequence[Sequence[int]]],
        questions: Sequence[Question],
        samples: int,
        step: int,
        first: int = 0,
    ) -> list[Group]:
        """A group for each question. Collective: each rank samples its share.

        ``first`` is the number of the first question within the step.
        """
        requests, rank, world = [], self.ranks.rank, self.ranks.world
        seed = self.config.train.seed
        for number in range(rank, len(questions), world):
            q = questions[number]
            seeds = [
                rollout_seed(seed, step, first + number, q.task, q.index, i) for i in range(samples)
            ]
            prompt = task_prompts[q.task][q.index]
            requests += make_requests(prompt, seeds, self.sampling_params, str(number))
        rollouts = sample_rollouts(self.engine, requests)
        data = json.dumps([rollout.to_wire() for rollout in rollouts]).encode()
        shares = [
            [Rollout.from_wire(wire) for wire in json.loads(share)]
            for share in self.ranks.gather(data)
        ]
        groups = []
        for number, q in enumerate(questions):
            start = number // world * samples
            answers = shares[number % world][start : start + samples]
            rewards = self._grade(tasks[q.task], q.index, answers)
            groups.append(Group(q, task_prompts[q.task][q.index], answers, rewards))
        return groups

    def _grade(self, task: Task, index: int, rollouts: Sequence[Rollout]) -> np.ndarray:
        by_tokens: dict[tuple[int, ...], float] = {}
        rewards = []
        for rollout in rollouts:
            key = tuple(rollout.tokens)
            if key not in by_tokens:
                is_wrong = rollout.is_truncated and self.rl.truncation == "wrong"
                text = answer_text(self.tokenizer, rollout.tokens)
                reward = 0.0 if is_wrong else float(task.grade(index, text))
                if not math.isfinite(reward):
                    raise ValueError(f"task={task.name!r} gave the reward {reward}: a number")
                by_tokens[key] = reward
            rewards.append(by_tokens[key])
        return np.array(rewards)

    # --- validation -----------------------------------------------------------------------------

    def evaluate(self, model: GPT) -> dict[str, float]:
        """``error_rate``, 1 - pass@1; pass@1 of each task and of all, and pass@k for k samples."""
        if self._ahead is not None:
            self._ahead.result()  # the engines sample with other weights
        self.engine.load(self._version, model.state_dict())
        questions = [
            Question(number, index)
            for number, task in enumerate(self.val_tasks)
            for index in range(len(task))
        ]
        samples = self.rl.eval_samples
        groups = self._ask(self.val_tasks, self.val_prompts, questions, samples, EVAL_STEP)
        self._last_groups = groups
        by_task = [
            np.stack([g.rewards for g in groups if g.question.task == number])
            for number in range(len(self.val_tasks))
        ]
        mean = float(np.mean([rewards.mean() for rewards in by_task]))
        figures = {"error_rate": 1 - mean, "pass@1": mean}
        figures[f"pass@{samples}"] = float(np.mean([r.max(axis=1).mean() for r in by_task]))
        for name, rewards in zip(self.rl.tasks, by_task, strict=True):
            figures[f"pass@1/{name}"] = float(rewards.mean())
        return figures

    def samples(self, model: GPT) -> list[dict[str, Any]]:
        """The first answer of the last validation to a question of each task, with its reward."""
        result = []
        for number, task in enumerate(self.val_tasks):
            group = next(g for g in self._last_groups if g.question.task == number)
            result.append(
                {
                    "prompt": str(task.question(group.question.index)[-1]["content"]),
                    "text": answer_text(self.tokenizer, group.rollouts[0].tokens, shows_tools=True),
                    "reward": float(group.rewards[0]),
                }
            )
        return result
