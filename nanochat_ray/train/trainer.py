"""The trainer, in plain torch: one process, a rank of ``torchrun`` or a Ray Train worker alike.

Every rank runs a ``Trainer`` with the same configuration. Step k trains on the batch that (dataset,
seed, batch size, k) name, however often the run was stopped before. A stop loses at most the steps
since the last checkpoint, and these are repeated bitwise identically on the same hardware.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_ray import machine
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checkpoint.reader import load_weights
from nanochat_ray.model.config import flops_per_token
from nanochat_ray.optim.schedule import window_share
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import Store
from nanochat_ray.train import hardware, identity, memory, preflight
from nanochat_ray.train.build_model import build_model, compiles, use_deterministic_algorithms
from nanochat_ray.train.checkpointer import Checkpointer
from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.data_loader import prefetch
from nanochat_ray.train.divergence import DivergenceGuard
from nanochat_ray.train.hooks import Hooks
from nanochat_ray.train.loggers import metric_loggers
from nanochat_ray.train.metrics import Metrics, val_metric
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.source import DatasetSource, Source
from nanochat_ray.train.step import Batch, RankVotes, StepResult, train_step

_LOG = logging.getLogger(__name__)
POLL_INTERVAL_S = 5.0
"""Seconds between two calls of ``Hooks.should_save``."""


class Evaluation(NamedTuple):
    """A validation's metric (lower is better; None if it has none), and whether it is the best."""

    metric: float | None
    is_best: bool


class Trainer:
    """Trains one configuration to its end, from the run's latest checkpoint if there is one.

    ``run`` does all; ``setup``, ``step``, ``evaluate`` and ``save`` are its parts. All of them are
    collective over the process group, if there is one.
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        device: torch.device | None = None,
        local_world_size: int = 1,
        source: Source | None = None,
        hooks: Sequence[Hooks] = (),
    ):
        """``local_world_size`` is the number of workers on this machine. ``source`` replaces the
        plain reading of the configuration's dataset."""
        self.config, self.train_config = config, config.train
        self.device = device or torch.device("cpu")
        if self.device.type == "cuda":
            machine.use_expandable_segments()
        self.local_world_size = local_world_size
        self.hooks = list(hooks)
        self.source: Source = source or DatasetSource(config)
        self.store = Store.at(config.storage).child("runs", config.run)
        self.completed_steps = 0
        self.save_pending = False
        self._window_share = 0.0
        """Of the last step of this process."""
        self._last_poll = time.monotonic()
        self._on_exit = contextlib.ExitStack()

    def run(self) -> dict[str, Any]:
        """Trains to the end of the configuration; returns the last metrics.

        ``done`` in them is false if a hook stopped the run. Raises DoesNotFitError, on every rank,
        if one has too little memory; ValueError if the run's checkpoint does not fit the
        configuration; FloatingPointError if the run has diverged.
        """
        try:
            self.setup()
            steps = self.train_config.steps
            if self.completed_steps == 0:
                self.evaluate()
            self.metrics.start_clock(steps)
            try:
                if self.completed_steps < steps:
                    self._run_steps()
            except FloatingPointError:  # on every rank alike
                self.checkpointer.finish(self.completed_steps, self.metrics)
                raise
            except torch.OutOfMemoryError as error:
                # Not to be repeated by a restart, as other errors of a worker are.
                raise memory.DoesNotFitError(
                    f"micro_batch_size={self.train_config.micro_batch_size}: {self.device} ran out "
                    f"of memory after {self.completed_steps} steps; lower it, or set "
                    f"checkpoint_activations ({str(error).partition('. ')[0]})"
                ) from error
            self.checkpointer.finish(self.completed_steps, self.metrics)
        finally:
            self._on_exit.close()
            for hook in self.hooks:
                hook.close()
        step = self.completed_steps
        return {**self.metrics.summary(), "step": step, "done": step >= steps}

    def setup(self) -> None:
        """Model, data, validation, loggers; all state from the latest checkpoint, if any."""
        config = self.config
        self.ranks = Ranks(self.device)
        self.ranks.run_together(lambda: preflight.check_device(config, self.device))
        preflight.check_memory(config, local_world_size=self.local_world_size, device=self.device)
        preflight.check_workers(config, self.ranks.world)
        if config.train.deterministic:
            use_deterministic_algorithms()
        # Only rank 0 reads weights: the optimizer sends them to the others when it is made.
        self.model = self.ranks.run_together(
            lambda: build_model(
                config, Store.at(config.storage), self.device, loads_parent=self.ranks.rank == 0
            )
        )
        self.source.setup(self.model, self.ranks)
        self.tokenizer = self.source.tokenizer
        self.about = config.about
        if "dataset_digest" not in self.about:
            self.about = {**self.about, **self.source.identity()}
        if self.ranks.rank == 0:
            self.hooks[:0] = metric_loggers(config)
        self._setup_state()

    def _setup_state(self) -> None:
        """What holds state: metrics, optimizer, checkpointer."""
        config = self.train_config
        peak = hardware.detect(self.device).peak(config.precision)
        self.metrics = Metrics(
            flops_per_token=flops_per_token(self.model.config),
            peak_flops=self.ranks.world * peak,
            bytes_per_token=self.source.bytes_per_token,
        )
        self.guard = DivergenceGuard(self.model, config, self.metrics, self.ranks, self.store)
        self.optimizer = self._resume()
        description = hardware.describe(self.device, config.precision)
        self.checkpointer = Checkpointer(
            self.store,
            config,
            self.tokenizer,
            self.model,
            self.optimizer,
            self.ranks,
            about=self.about,
            source_state=self.source.state,
            hardware={**description, "workers": self.ranks.world},
            check_publish=self._check_publish,
        )
        self._on_exit.callback(self.checkpointer.writer.give_up)

    def _resume(self) -> ShardedOptimizer:
        """The optimizer, and all state as the latest checkpoint has it, if there is one."""
        # Ranks load at different speeds; run_together waits for all of them.
        # Rank 0 looks: the last write of a dead predecessor may end while ranks do.
        is_first = self.ranks.rank == 0
        name = self.ranks.run_together(lambda: checkpoint.latest(self.store) if is_first else None)
        name = self.ranks.gather((name or "").encode())[0].decode()
        state = self.ranks.run_together(lambda: self._load(name))
        optimizer = ShardedOptimizer(
            self.model,
            self.train_config.optim,
            self.model.compute_dtype,
            compile_update=compiles(self.config, self.device),
        )
        if state is not None:
            trainer_state, optimizer_state = state
            self.ranks.run_on_first(lambda: optimizer.check_state_dict(optimizer_state))
            optimizer.load_state_dict(optimizer_state)
            self.ranks.run_together(lambda: self.source.load_state(trainer_state.get("source", {})))
        return optimizer

    def _load(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The state of the trainer at a checkpoint and, on rank 0, of the optimizer; with its
        records read and, on rank 0, its weights in the model. None where ``name`` is empty."""
        warnings = checkpoint.resume_warnings(self.store)
        state = None
        if name:
            warnings += identity.check_resumable(
                self.store,
                name,
                model=self.model.config,
                train=self.train_config,
                tokenizer=self.tokenizer.fingerprint,
                about=self.about,
            )
            if self.ranks.rank == 0:
                latest = checkpoint.load(self.store, name, optimizer=True)
                where = f"checkpoint {self.store.child(name).uri}: weights.msgpack"
                load_weights(self.model, latest.weights, where)
                state = latest.trainer, latest.optimizer or {}
            else:
                state = checkpoint.load_trainer(self.store, name), {}
            self.completed_steps = checkpoint.step_of(name)
            log = _read_log(self.store)
            warnings += self.metrics.resume(log, state[0], before=self.completed_steps)
        if self.ranks.rank == 0:
            for warning in warnings:
                _LOG.warning("run %s: %s", self.store.uri, warning)
        return state

    # --- one step -------------------------------------------------------------------------------

    def _run_steps(self) -> None:
        """Steps, validations and checkpoints up to the last step, or until a hook stops them."""
        batches = self.source.batches(self.completed_steps)
        with contextlib.ExitStack() as stack:
            if not self.source.on_policy:
                prefetching = prefetch(batches, pin=self.device.type == "cuda")
                batches = stack.enter_context(contextlib.closing(prefetching))
            stack.enter_context(_frozen_gc())
            while self.completed_steps < self.train_config.steps:
                result, batch = self.step(batches)
                self._evaluate_and_save(result, batch)
                if result.votes.stop:
                    return

    def step(self, batches: Iterator[Batch]) -> tuple[StepResult, Batch]:
        """Trains on the next batch, which it returns too, and records it."""
        config, start = self.train_config, time.perf_counter()
        share = window_share(self.completed_steps, config.steps, config.window_warmup)
        # Only the first step with a set of windows compiles.
        is_warmup, self._window_share = share != self._window_share, share
        votes = self._votes()
        batch = next(batches)
        data_wait = time.perf_counter() - start
        result = train_step(
            self.model,
            self.optimizer,
            batch,
            self.completed_steps,
            config,
            objective=self.source.objective,
            clip=self.guard.spike_bound(),
            votes=votes,
        )
        if result.votes.writer_error:
            self.checkpointer.wait()
        self.completed_steps += 1
        record = self.metrics.step(
            self.completed_steps,
            result,
            seconds=time.perf_counter() - start,
            data_wait=data_wait,
            is_warmup=is_warmup,
            **batch.metrics,
            **self.checkpointer.figures(),
        )
        self._record(record)
        self.guard.check_step(self.completed_steps, result)
        return result, batch

    def _votes(self) -> RankVotes:
        is_first, config, step = self.ranks.rank == 0, self.train_config, self.completed_steps + 1
        stops = [hook.should_stop() for hook in self.hooks]
        poll = is_first and time.monotonic() - self._last_poll > POLL_INTERVAL_S
        # A checkpoint may follow this step: no attempt to write an older one is to begin meanwhile.
        may_save = self.save_pending or poll
        may_save |= _is_due(step, config.save_every) or _is_due(step, config.eval_every)
        may_save |= step == config.steps
        return RankVotes(
            stop=any(stops),
            poll=poll,
            writer_idle=is_first and may_save and self.checkpointer.writer.hold(),
            writer_error=self.checkpointer.writer.has_error,
        )

    def _evaluate_and_save(self, result: StepResult, batch: Batch) -> None:
        """What follows a step: a validation and a checkpoint, where they are due."""
        config, votes, skipping = self.train_config, result.votes, self.guard.skipped_steps > 0
        is_last = self.completed_steps == config.steps
        evaluation = Evaluation(None, is_best=False)
        if is_last or _is_due(self.completed_steps, config.eval_every):
            evaluation = self.evaluate()
        self.save_pending |= _is_due(self.completed_steps, config.save_every)
        if votes.poll:
            self._last_poll = time.monotonic()
            saves = [hook.should_save() for hook in self.hooks]  # collective: all are called
            self.save_pending |= any(saves)
        # A checkpoint that is due while the last one is still being written waits for it, without
        # stalling the training; and none is started while steps are being skipped.
        save = (evaluation.is_best and config.keep_best) or (
            self.save_pending and votes.writer_idle
        )
        if is_last or (save and not skipping):
            self.guard.check_weights(self.completed_steps, result.loss, evaluation.metric, batch)
            self.save(evaluation.metric)
        elif votes.stop and not skipping and math.isfinite(result.loss):
            self.save(evaluation.metric)
        else:
            self.checkpointer.writer.release()

    def evaluate(self) -> Evaluation:
        """Validates, and generates samples on rank 0."""
        start = time.perf_counter()
        self.model.eval()
        metrics = self.source.evaluate(self.model)
        best_before = self.metrics.best()
        seconds = time.perf_counter() - start
        record = self.metrics.add(
            kind="eval", step=self.completed_steps, seconds=seconds, **metrics
        )
        self._record(record)
        self.ranks.run_on_first(self._sample)
        self.model.train()
        metric = val_metric(record)
        is_best = metric is not None and best_before is not None and metric < best_before[1]
        return Evaluation(metric, is_best)

    def save(self, metric: float | None = None) -> None:
        """Starts a checkpoint; ``metric`` is that of a validation at this step, if there was
        one."""
        stall = self.checkpointer.save(self.completed_steps, self.metrics, metric)
        self.save_pending = False
        self._record(self.metrics.add(kind="save", step=self.completed_steps, stall=stall))

    def _sample(self) -> None:
        for sample in self.source.samples(self.model):
            self._record(self.metrics.add(kind="sample", step=self.completed_steps, **sample))

    def _record(self, record: dict[str, Any]) -> None:
        for hook in self.hooks:
            hook.on_record(record)

    def _check_publish(self) -> None:
        for hook in self.hooks:
            hook.check_publish()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _read_log(store: Store) -> str:
    """metrics.jsonl, or what of it can be read: a log never blocks a run."""
    try:
        return store.read_bytes("metrics.jsonl").decode(errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def _frozen_gc() -> Iterator[None]:
    """What exists at the start is not searched for garbage: a search of torch and the model takes
    0.1 s, while a GPU runs out of work. A process that has frozen its objects before keeps them so.
    """
    is_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not is_frozen:
            gc.unfreeze()
