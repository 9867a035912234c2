"""The training loop, in plain torch: one process, ``torchrun``, or a Ray Train worker alike.

Every rank calls ``run`` with the same configuration. Step k sees the batch that (dataset, seed,
batch size, k) names, however often the run was stopped before; what a stop loses is at most the
steps since the last checkpoint, and those are repeated bit for bit on the same hardware.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nanochat_ray import config as configs
from nanochat_ray.checkpoint import snapshot
from nanochat_ray.config import TrainConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train.metrics import Metrics
from nanochat_ray.train.report import render
from nanochat_ray.train.step import Batch, train_step

MAX_SKIPPED = 5
"""Steps in a row with a gradient that is not finite before the run gives up."""


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
    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    """Called on every rank after each step and each validation."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after every step; true means: save and leave (the same answer on every rank)."""
    about: dict[str, Any] = field(default_factory=dict)
    """Facts of the run that its checkpoints keep (dataset, parent run, ...)."""


class Checkpointer:
    """Writes snapshots of a run in the background, one at a time; only rank 0 writes."""

    def __init__(self, run: Run, model: GPT, optimizer: ShardedOptimizer):
        self.run, self.model, self.optimizer = run, model, optimizer
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def _device(self) -> str:
        device = self.optimizer.flats[0].weights.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def save(self, step: int, metrics: Metrics) -> None:
        """Starts a snapshot after ``step`` steps. Collective. Raises what the last one raised."""
        self.wait()
        state = self.optimizer.state_dict()
        if self.optimizer.rank != 0:
            return
        weights = {
            name: t.detach().to("cpu", copy=True) for name, t in self.model.named_parameters()
        }
        trainer: dict[str, Any] = {
            "step": step,
            "train_config": configs.to_json(self.run.config),
            "about": self.run.about,
            "metrics": metrics.summary(),
        }
        text = metrics.to_jsonl()
        shown = {
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {self._device()}",
            "ranks": self.optimizer.world,
            "model": configs.to_json(self.model.config),
            **trainer,
        }
        page = render(
            self.run.store.root.rpartition("/")[2], metrics.records, trainer["metrics"], shown
        )

        def write() -> None:
            try:
                self.run.store.write_text("metrics.jsonl", text)
                self.run.store.write_text("report.html", page)
                snapshot.save(
                    self.run.store,
                    step,
                    model_config=self.model.config,
                    weights=weights,
                    optimizer=state,
                    trainer=trainer,
                    tokenizer=self.run.tokenizer,
                )
                snapshot.prune(self.run.store, self.run.config.keep)
            except BaseException as error:  # handed to the training thread by wait()
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Until the snapshot under way is whole."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def same_run(old: dict[str, Any], new: TrainConfig) -> None:
    """ValueError if a checkpoint's configuration would give other steps than ``new``."""
    free = {"micro_rows", "eval_every", "eval_rows", "save_every", "keep"}
    for name, value in configs.to_json(new).items():
        if name not in free and old.get(name) != value:
            raise ValueError(
                f"{name}={value!r} is not what this run was started with ({old.get(name)!r}): "
                "give the same value, or another run name"
            )


def run(model: GPT, run: Run) -> dict[str, Any]:
    """Trains ``model`` in place to the end of ``run.config``; returns the last metrics.

    Resumes from the run's latest snapshot if there is one. Raises ValueError if that snapshot
    belongs to another configuration, FloatingPointError if the gradient stays not finite.
    """
    config, start, metrics = run.config, 0, Metrics()
    name = snapshot.latest(run.store)
    saved = snapshot.load(run.store, name, optimizer=True) if name else None
    if saved is not None:
        same_run(saved.trainer["train_config"], config)
        if saved.tokenizer.fingerprint != run.tokenizer.fingerprint:
            raise ValueError(f"run {run.store.uri} was trained with another tokenizer")
        model.load_state_dict(saved.weights)
        start = saved.step
        if run.store.exists("metrics.jsonl"):
            metrics = Metrics.from_jsonl(run.store.read_text("metrics.jsonl"), before=start)
    optimizer = ShardedOptimizer(model, config.optim, model.compute_dtype)
    if saved is not None and saved.optimizer is not None:
        optimizer.load_state_dict(saved.optimizer)
    del saved
    checkpointer = Checkpointer(run, model, optimizer)

    def validate(step: int) -> None:
        began = time.perf_counter()
        model.eval()
        found = run.evaluate(model)
        model.train()
        seconds = time.perf_counter() - began
        run.report(metrics.add(kind="eval", step=step, seconds=seconds, **found))

    if start == 0:
        validate(0)
    model.train()
    batches = run.batches(start) if start < config.steps else iter(())
    skipped, step = 0, start
    metrics.start_clock(start, config.steps)
    while step < config.steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        result = train_step(model, optimizer, batch, step, config)
        step += 1
        tokens = config.batch_rows * (batch.ids.shape[1] - 1)
        seconds = time.perf_counter() - asked
        run.report(metrics.step(step, result, seconds=seconds, waited=waited, tokens=tokens))
        skipped = 0 if result.applied else skipped + 1
        if skipped >= MAX_SKIPPED:
            raise FloatingPointError(
                f"the gradient was not finite in {skipped} steps up to step {step} (loss "
                f"{result.loss}); the last checkpoint, {snapshot.latest(run.store)}, is sound"
            )
        last, stop = step == config.steps, run.should_stop()
        if last or (config.eval_every and step % config.eval_every == 0):
            validate(step)
        due = config.save_every and step % config.save_every == 0
        if (last or stop or due) and not skipped:
            checkpointer.save(step, metrics)
        if stop and not last:
            break
    checkpointer.wait()
    return {**metrics.summary(), "step": step, "done": step >= config.steps}
