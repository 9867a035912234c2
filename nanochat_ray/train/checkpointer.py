"""Checkpoints beside the training: the trainer's thread copies, another thread writes.

Storage that fails does not stop the training: the copy stays in memory and is written when storage
is back (``checkpoint_writer``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from nanochat_ray import config as configs
from nanochat_ray import machine
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import eval_report
from nanochat_ray.train.checkpoint_writer import CheckpointWriter, PendingCheckpoint
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.metrics import Metrics, to_jsonl
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.report import render

_LOG = logging.getLogger(__name__)


class Checkpointer:
    """Writes checkpoints of a run in the background, one at a time; only rank 0 writes."""

    def __init__(
        self,
        store: Store,
        config: TrainConfig,
        tokenizer: Tokenizer,
        model: GPT,
        optimizer: ShardedOptimizer,
        ranks: Ranks,
        *,
        about: dict[str, Any],
        hardware: dict[str, Any],
        source_state: Callable[[], dict[str, Any]] = dict,
        check_publish: Callable[[], None] = lambda: None,
    ):
        """``source_state`` returns ``Source.state``. ``check_publish`` is called before anything is
        published; it raises if this process may not publish (``claim``)."""
        self.store, self.config, self.tokenizer = store, config, tokenizer
        self.model, self.optimizer = model, optimizer
        self.ranks, self.about, self.hardware = ranks, about, hardware
        self.source_state, self.check_publish = source_state, check_publish
        self.writer = CheckpointWriter()
        self._start = time.time()
        self._has_warned = False

    def figures(self) -> dict[str, float]:
        """On rank 0, in seconds: ``checkpoint_age``, since the last checkpoint that is written was
        taken, or since the start; ``save_pending``, since the one was taken that is being written;
        ``save_delay``, for how long storage has failed."""
        if self.ranks.rank != 0:
            return {}
        age = time.time() - (self.writer.last_time or self._start)
        return {
            "checkpoint_age": age,
            "save_pending": self.writer.pending_s,
            "save_delay": self.writer.delay_s,
        }

    def save(self, step: int, metrics: Metrics, val_metric: float | None) -> float:
        """Starts a checkpoint after ``step`` steps; returns the seconds that training stood still.

        ``val_metric`` is that of a validation at this step, if there was one. Collective. A
        checkpoint that storage has refused until now is dropped. Raises what a write raised that
        failed for good.
        """
        start = time.perf_counter()
        self.ranks.run_together(self.writer.await_attempt)
        optimizer_state = self.optimizer.state_dict(on_rank=0)
        if self.optimizer.rank != 0:
            return time.perf_counter() - start
        weights = {n: machine.copy_to_host(p) for n, p in self.model.named_parameters()}
        machine.finish_copies(self.ranks.device)
        records = list(metrics.records)
        trainer_state = self._trainer_state(step, metrics) | metrics.state()

        def write() -> None:
            self._publish_metrics(records, trainer_state)
            checkpoint.save(
                self.store,
                step,
                model_config=self.model.config,
                weights=weights,
                optimizer=optimizer_state,
                trainer=trainer_state,
                tokenizer=self.tokenizer,
                val_metric=val_metric,
                check_publish=self.check_publish,
            )
            self._prune()

        name = f"run {self.store.uri}: checkpoint {checkpoint.name_of(step)}"
        self.writer.put(PendingCheckpoint(name, write, is_validated=val_metric is not None))
        return time.perf_counter() - start

    def finish(self, step: int, metrics: Metrics) -> None:
        """Waits for the last checkpoint, then writes all metrics and the report. Collective."""
        self.wait()
        trainer_state = self._trainer_state(step, metrics)

        def write() -> None:
            self.check_publish()
            self._publish_metrics(metrics.records, trainer_state)

        self.ranks.run_on_first(write)

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, for at most ``save_timeout_s`` while
        storage fails. Collective; raises what the write raised."""
        self.ranks.run_together(lambda: self.writer.await_end(self.config.save_timeout_s))

    def _prune(self) -> None:
        """The new checkpoint is complete: what cannot be deleted now is deleted after the next."""
        try:
            checkpoint.prune(self.store, self.config.keep_latest_k, keep_best=self.config.keep_best)
        except OSError as error:
            _LOG.warning("run %s: old checkpoints stay: %s", self.store.uri, error)

    def _trainer_state(self, step: int, metrics: Metrics) -> dict[str, Any]:
        """trainer.json, but for what ``metrics`` needs to resume."""
        return {
            "step": step,
            "train_config": configs.to_json(self.config),
            "about": self.about,
            "source": self.source_state(),
            "metrics": metrics.summary(),
        }

    def _publish_metrics(self, records: list[dict[str, Any]], trainer: dict[str, Any]) -> None:
        """A log never blocks a run: if it cannot be written, that is logged and the run
        continues."""
        try:
            self._write_metrics(records, trainer)
        except Exception as error:
            if not self._has_warned:
                _LOG.warning("run %s: its log cannot be written: %s", self.store.uri, error)
            self._has_warned = True
        else:
            self._has_warned = False

    def _write_metrics(self, records: list[dict[str, Any]], trainer: dict[str, Any]) -> None:
        name = self.store.root.rpartition("/")[2]
        about = {"model": configs.to_json(self.model.config), **trainer}
        self.store.write_text("metrics.jsonl", to_jsonl(records))
        evals = eval_report.section(eval_report.read_figures(self.store))
        page = render(
            name, records, trainer["metrics"], about=about, hardware=self.hardware, evals=evals
        )
        self.store.write_text("report.html", page)
