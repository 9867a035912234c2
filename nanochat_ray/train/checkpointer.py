"""Checkpoints beside the training: the trainer's thread copies, another thread writes."""

from __future__ import annotations

import logging
import threading
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
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def idle(self) -> bool:
        """No checkpoint is being written."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def has_error(self) -> bool:
        """The last write raised; ``wait`` raises its error."""
        return self.idle and self._error is not None

    def save(self, step: int, metrics: Metrics, val_metric: float | None) -> float:
        """Starts a checkpoint after ``step`` steps; returns the seconds that training stood still.

        ``val_metric`` is that of a validation at this step, if there was one. Collective. Raises
        what the last write raised.
        """
        start = time.perf_counter()
        self.wait()
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
            checkpoint.prune(self.store, self.config.keep_latest_k, keep_best=self.config.keep_best)

        self._start(write, f"checkpoint-{step}")
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
        """Waits for the checkpoint that is being written. Collective; raises what the write
        raised."""
        self.ranks.run_together(self._join)

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
            _LOG.warning("run %s: its log cannot be written: %s", self.store.uri, error)

    def _write_metrics(self, records: list[dict[str, Any]], trainer: dict[str, Any]) -> None:
        name = self.store.root.rpartition("/")[2]
        about = {"model": configs.to_json(self.model.config), **trainer}
        self.store.write_text("metrics.jsonl", to_jsonl(records))
        page = render(name, records, trainer["metrics"], about=about, hardware=self.hardware)
        self.store.write_text("report.html", page)

    def _start(self, write: Callable[[], None], name: str) -> None:
        def run() -> None:
            try:
                write()
            except BaseException as error:  # raised in the trainer's thread by wait()
                self._error = error

        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
