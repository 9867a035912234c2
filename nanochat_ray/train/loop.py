"""The training loop, in plain torch: one process, ``torchrun``, or a Ray Train worker alike.

Every rank calls ``run`` with the same configuration. Step k sees the batch that (dataset, seed,
batch size, k) names, however often the run was stopped before; what a stop loses is at most the
steps since the last checkpoint, and those are repeated bit for bit on the same hardware.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray import config as configs
from nanochat_ray import scaling
from nanochat_ray.checkpoint import snapshot
from nanochat_ray.config import TrainConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train.feed import prefetched
from nanochat_ray.train.metrics import Metrics, score
from nanochat_ray.train.saving import Checkpointer
from nanochat_ray.train.step import Batch, train_step

MAX_SKIPPED = 5
"""Steps in a row with a gradient that is not finite before the run gives up."""
SPIKE_WINDOW = 100
"""Steps whose gradient norms say what is usual."""
LOOK_EVERY = 5.0
"""Seconds between two looks at whether a machine of the run will be taken away."""
FREE = (
    *("micro_rows", "eval_every", "eval_rows", "save_every", "keep", "keep_best"),
    *("checkpoint_activations", "deterministic", "sample_tokens"),
)
"""Fields of TrainConfig that may change when a run is resumed: they do not change its steps."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a loop needs beside the model: where it stores, what it reads, whom it tells."""

    config: TrainConfig
    store: Store
    """The run's own folder."""
    tokenizer: Tokenizer
    batches: Callable[[int], Iterator[Batch]]
    """From a first step: this rank's batch of that step, of the next, and so on."""
    evaluate: Callable[[GPT], dict[str, float]]
    """Validation; collective over the ranks, with the same result on each."""
    sample: Callable[[GPT], list[tuple[str, str]]] | None = None
    """(prompt, text) pairs at each validation; asked on rank 0 alone."""
    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    """Called on every rank with each record: a step, a validation, a text, a checkpoint."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked before every step. One rank's yes means to all: after the step, save and leave."""
    should_save: Callable[[], bool] | None = None
    """Collective, with the same answer on each rank; asked after a step every ``LOOK_EVERY``
    seconds. Yes means: save now, and go on."""
    about: dict[str, Any] = field(default_factory=dict)
    """Facts of the run that its checkpoints keep (dataset, parent run, ...)."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """What the run computes on, for its report."""
    peak_flops: float = 0.0
    """Of all workers together, for the MFU; 0 if it is not known."""
    bytes_per_token: float = 0.0
    """Of the dataset, for training's bits per byte; 0 if it is not known."""


def same_run(old: dict[str, Any], new: TrainConfig) -> None:
    """ValueError if a checkpoint's configuration would give other steps than ``new``."""
    unset = configs.to_json(TrainConfig(steps=1, batch_rows=1, micro_rows=1))
    for name, value in configs.to_json(new).items():
        # A field that is younger than the checkpoint had its default then.
        before = old.get(name, unset[name])
        if name not in FREE and before != value:
            raise ValueError(
                f"{name}={value!r} is not what this run was started with ({before!r}): "
                "give the same value, or another run name"
            )


def run(model: GPT, run: Run) -> dict[str, Any]:
    """Trains ``model`` in place to the end of ``run.config``; returns the last metrics.

    Resumes from the run's latest snapshot if there is one. Raises ValueError if that snapshot
    belongs to another configuration, FloatingPointError if the gradient stays not finite.
    """
    return _Loop(model, run).run()


class _Loop:
    """The state of a run between its steps."""

    def __init__(self, model: GPT, run: Run):
        self.model, self.spec, self.config = model, run, run.config
        model.checkpoint_activations = run.config.checkpoint_activations
        self.metrics = Metrics(
            flops_per_token=scaling.flops_per_token(model.config),
            peak_flops=run.peak_flops,
            bytes_per_token=run.bytes_per_token,
        )
        self.step = 0
        self.optimizer = self._resume()
        self.checkpointer = Checkpointer(
            run.store,
            run.config,
            run.tokenizer,
            model,
            self.optimizer,
            about=run.about,
            hardware={**run.hardware, "workers": self.optimizer.world},
        )
        self.skipped, self.looked, self.due = 0, time.monotonic(), False

    def _resume(self) -> ShardedOptimizer:
        """The optimizer, and all state as the latest snapshot has it, if there is one."""
        store, model = self.spec.store, self.model
        name = snapshot.latest(store)
        saved = snapshot.load(store, name, optimizer=True) if name else None
        if saved is not None:
            same_run(saved.trainer["train_config"], self.config)
            if saved.tokenizer.fingerprint != self.spec.tokenizer.fingerprint:
                raise ValueError(f"run {store.uri} was trained with another tokenizer")
            model.load_state_dict(saved.weights)
            self.step = saved.step
            if store.exists("metrics.jsonl"):
                self.metrics.resume(store.read_text("metrics.jsonl"), before=self.step)
        optimizer = ShardedOptimizer(model, self.config.optim, model.compute_dtype)
        if saved is not None and saved.optimizer is not None:
            optimizer.load_state_dict(saved.optimizer)
        return optimizer

    def run(self) -> dict[str, Any]:
        steps = self.config.steps
        if self.step == 0:
            self._validate()
        self.model.train()
        self.metrics.start_clock(self.step, steps)
        if self.step < steps:
            device = self.optimizer.flats[0].weights.device
            batches = prefetched(self.spec.batches(self.step), pin=device.type == "cuda")
            with contextlib.closing(batches):
                while self.step < steps and not self._advance(batches):
                    pass
        self.checkpointer.finish(self.step, self.metrics)
        return {**self.metrics.summary(), "step": self.step, "done": self.step >= steps}

    def _advance(self, batches: Iterator[Batch]) -> bool:
        """One step and what follows it; true when the run was asked to stop."""
        config, spec = self.config, self.spec
        asked = time.perf_counter()
        look = spec.should_save is not None and time.monotonic() - self.looked > LOOK_EVERY
        first = self.optimizer.rank == 0
        # What a rank alone cannot decide: each one's wish to stop, rank 0's clock and its writer.
        flags = (spec.should_stop(), first and look, first and self.checkpointer.idle)
        batch = next(batches)
        waited = time.perf_counter() - asked
        result = train_step(
            self.model,
            self.optimizer,
            batch,
            self.step,
            config,
            clip=self._usual_norm(),
            flags=flags,
        )
        stop, look, idle = (flag > 0 for flag in result.flags)
        self.step += 1
        tokens = config.batch_rows * (batch.ids.shape[1] - 1)
        seconds = time.perf_counter() - asked
        spec.report(
            self.metrics.step(self.step, result, seconds=seconds, waited=waited, tokens=tokens)
        )
        self._guard(result.applied, result.loss)
        last = self.step == config.steps
        best, found = False, None
        if last or (config.eval_every and self.step % config.eval_every == 0):
            best, found = self._validate()
        self.due |= bool(config.save_every) and self.step % config.save_every == 0
        if look:
            self.looked = time.monotonic()
            self.due |= spec.should_save is not None and spec.should_save()
        # A checkpoint that is due while the last one is still being written waits for it, without
        # holding training up; and none is begun while steps are being skipped.
        wanted = (best and config.keep_best) or (self.due and idle)
        if last or stop or (wanted and not self.skipped):
            self._save(found)
        return stop and not last

    def _usual_norm(self) -> float:
        """What the gradient norm may be at most by the rule of spikes; 0 is anything."""
        norms = self.metrics.grad_norms(SPIKE_WINDOW) if self.config.spike_clip else []
        if len(norms) < SPIKE_WINDOW // 2:
            return 0.0
        return self.config.spike_clip * statistics.median(norms)

    def _guard(self, applied: bool, loss: float) -> None:
        self.skipped = 0 if applied else self.skipped + 1
        if self.skipped >= MAX_SKIPPED:
            self.checkpointer.finish(self.step, self.metrics)
            raise FloatingPointError(
                f"the gradient was not finite in {self.skipped} steps up to step {self.step} "
                f"(loss {loss}); the last checkpoint, {snapshot.latest(self.spec.store)}, is "
                "sound: resume from it with lower rates or grad_clip under another run name"
            )

    def _validate(self) -> tuple[bool, float | None]:
        """Whether it is the best validation so far, and its figure."""
        began = time.perf_counter()
        self.model.eval()
        found = self.spec.evaluate(self.model)
        before = self.metrics.best()
        seconds = time.perf_counter() - began
        record = self.metrics.add(kind="eval", step=self.step, seconds=seconds, **found)
        self.spec.report(record)
        if self.spec.sample is not None and self.optimizer.rank == 0:
            for prompt, text in self.spec.sample(self.model):
                shown = {"kind": "sample", "step": self.step, "prompt": prompt, "text": text}
                self.spec.report(self.metrics.add(**shown))
        self.model.train()
        figure = score(record)
        better = figure is not None and before is not None and figure < before[1]
        return better, figure

    def _save(self, found: float | None) -> None:
        stall = self.checkpointer.save(self.step, self.metrics, found)
        self.due = False
        self.spec.report(self.metrics.add(kind="save", step=self.step, stall=stall))
