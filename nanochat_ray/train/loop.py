"""The training loop, in plain torch: one process, ``torchrun``, or a Ray Train worker alike.

Every rank calls ``run`` with the same configuration. Step k sees the batch that (dataset, seed,
batch size, k) names, however often the run was stopped before; what a stop loses is at most the
steps since the last checkpoint, and those are repeated bit for bit on the same hardware.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.config import flops_per_token
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import identity
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.feed import prefetched
from nanochat_ray.train.metrics import Metrics, score
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.saving import Checkpointer
from nanochat_ray.train.step import Batch, split, train_step

_LOG = logging.getLogger(__name__)
MAX_SKIPPED = 5
"""Steps in a row with a gradient that is not finite before the run gives up."""
SPIKE_WINDOW = 100
"""Steps whose gradient norms say what is usual."""
LOOK_EVERY = 5.0
"""Seconds between two looks at whether a machine of the run will be taken away."""


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
    """Facts of the run that its checkpoints keep: data and parent (``identity.describe``), ..."""
    ranks: Ranks = field(default_factory=Ranks)
    may_publish: Callable[[], None] = lambda: None
    """Asked on rank 0 before anything is published; raises if another job has taken over."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """What the run computes on, for its report."""
    peak_flops: float = 0.0
    """Of all workers together, for the MFU; 0 if it is not known."""
    bytes_per_token: float = 0.0
    """Of the dataset, for training's bits per byte; 0 if it is not known."""


def run(model: GPT, run: Run) -> dict[str, Any]:
    """Trains ``model`` in place to the end of ``run.config``; returns the last metrics.

    Resumes from the run's latest checkpoint if there is one. Raises ValueError if that checkpoint
    belongs to another configuration, FloatingPointError if the gradient stays not finite.
    """
    return _Loop(model, run).run()


def _log_of(store: Store) -> str:
    """metrics.jsonl, or what of it can be read: a log never blocks a run."""
    try:
        return store.read_bytes("metrics.jsonl").decode(errors="replace")
    except OSError:
        return ""


class _Loop:
    """The state of a run between its steps."""

    def __init__(self, model: GPT, run: Run):
        self.model, self.spec, self.config = model, run, run.config
        self.ranks = run.ranks
        model.checkpoint_activations = run.config.checkpoint_activations
        self.metrics = Metrics(
            flops_per_token=flops_per_token(model.config),
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
            run.ranks,
            about=run.about,
            hardware={**run.hardware, "workers": self.optimizer.world},
        )
        self.checkpointer.may_publish = run.may_publish
        self.skipped, self.looked, self.due = 0, time.monotonic(), False

    def _resume(self) -> ShardedOptimizer:
        """The optimizer, and all state as the latest checkpoint has it, if there is one."""
        # The ranks may be quick and slow to load; from here on they are together again.
        saved = self.ranks.together(self._load)
        optimizer = ShardedOptimizer(self.model, self.config.optim, self.model.compute_dtype)
        if saved is not None and saved.optimizer is not None:
            state = saved.optimizer
            self.ranks.together(lambda: optimizer.load_state_dict(state))
        return optimizer

    def _load(self) -> checkpoint.Checkpoint | None:
        """The checkpoint to resume from, with its weights in the model and its records read."""
        spec, store = self.spec, self.spec.store
        name = checkpoint.latest(store)
        notes = checkpoint.skipped(store)
        saved = None
        if name is not None:
            notes += identity.check_resumable(
                store,
                name,
                model=self.model.config,
                train=self.config,
                tokenizer=spec.tokenizer.fingerprint,
                about=spec.about,
            )
            saved = checkpoint.load(store, name, optimizer=True)
            where = f"checkpoint {store.child(name).uri}: weights.msgpack"
            checkpoint.load_weights(self.model, saved.weights, where)
            self.step = saved.step
            notes += self.metrics.resume(_log_of(store), saved.trainer, before=self.step)
        if self.ranks.rank == 0:
            for note in notes:
                _LOG.warning("run %s: %s", store.uri, note)
        return saved

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
        writer = self.checkpointer
        flags = (spec.should_stop(), first and look, first and writer.idle, writer.failed)
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
        stop, look, idle, failed = (flag > 0 for flag in result.flags)
        if failed:
            self.checkpointer.wait()
        self.step += 1
        tokens = config.global_batch_size * (batch.ids.shape[1] - 1)
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
        if last or (wanted and not self.skipped):
            self._check_finite(result.loss, found, batch)
            self._save(found)
        elif stop and not self.skipped and math.isfinite(result.loss):
            self._save(found)
        return stop and not last

    def _check_finite(self, loss: float, figure: float | None, batch: Batch) -> None:
        """FloatingPointError, on every rank, if the weights give a loss that is not finite.

        ``loss`` was taken before the step. Where no validation (``figure``) has looked at the
        weights since, the first micro-batch is run forward once more.
        """

        def check() -> None:
            after = figure if figure is not None else self._probe(batch)
            kind = "validation" if figure is not None else "training loss after it"
            for name, value in (("training loss", loss), (kind, after)):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the run has diverged at step {self.step}: its {name} is {value}. That "
                        f"checkpoint is not written; {self._last_checkpoint()}"
                    )

        try:
            self.ranks.together(check)
        except FloatingPointError:
            self.checkpointer.finish(self.step, self.metrics)
            raise

    @torch.no_grad()
    def _probe(self, batch: Batch) -> float:
        device = self.optimizer.flats[0].weights.device
        self.model.eval()
        inputs, targets = next(split(batch, self.config.micro_batch_size, device))
        loss = float(self.model.loss(inputs, targets, reduction="sum"))
        self.model.train()
        return loss

    def _last_checkpoint(self) -> str:
        name = checkpoint.latest(self.spec.store)
        if name is None:
            return "there is no earlier one: train another run with lower rates or grad_clip"
        return (
            f"the last one, {name}, is sound: train another run with lower rates or grad_clip, "
            "or look at it first"
        )

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
                f"(loss {loss}): the run has diverged; {self._last_checkpoint()}"
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
        if self.spec.sample is not None:
            self.ranks.first(self._sample)
        self.model.train()
        figure = score(record)
        better = figure is not None and before is not None and figure < before[1]
        return better, figure

    def _sample(self) -> None:
        """Texts for a person to read; rank 0 takes its time for them."""
        if self.spec.sample is not None:
            for prompt, text in self.spec.sample(self.model):
                shown = {"kind": "sample", "step": self.step, "prompt": prompt, "text": text}
                self.spec.report(self.metrics.add(**shown))

    def _save(self, found: float | None) -> None:
        stall = self.checkpointer.save(self.step, self.metrics, found)
        self.due = False
        self.spec.report(self.metrics.add(kind="save", step=self.step, stall=stall))
