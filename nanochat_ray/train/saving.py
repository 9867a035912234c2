"""Checkpoints beside the training: the copies are made here and now, the writing in a thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from nanochat_ray import config as configs
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
    ):
        self.store, self.config, self.tokenizer = store, config, tokenizer
        self.model, self.optimizer = model, optimizer
        self.ranks, self.about, self.hardware = ranks, about, hardware
        self.may_publish: Callable[[], None] = lambda: None
        """Called before anything is published; raises if this job may not (``claim``)."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def idle(self) -> bool:
        """Nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """The last writing has failed: ``wait`` raises why."""
        return self.idle and self._error is not None

    def save(self, step: int, metrics: Metrics, score: float | None) -> float:
        """Starts a checkpoint after ``step`` steps; returns the seconds that it held training up.

        ``score`` is the validation's figure at this step, if there was one. Collective. Raises
        what the last writing raised.
        """
        began = time.perf_counter()
        self.wait()
        state = self.optimizer.state_dict()
        if self.optimizer.rank != 0:
            return time.perf_counter() - began
        weights = {
            name: t.detach().to("cpu", copy=True) for name, t in self.model.named_parameters()
        }
        summary, records = metrics.summary(), list(metrics.records)
        trainer: dict[str, Any] = {
            "step": step,
            "train_config": configs.to_json(self.config),
            "about": self.about,
            "metrics": summary,
            **metrics.state(),
        }

        def write() -> None:
            self._publish_metrics(records, trainer)
            checkpoint.save(
                self.store,
                step,
                model_config=self.model.config,
                weights=weights,
                optimizer=state,
                trainer=trainer,
                tokenizer=self.tokenizer,
                score=score,
                may_publish=self.may_publish,
            )
            checkpoint.prune(self.store, self.config.keep_latest_k, keep_best=self.config.keep_best)

        self._start(write, f"checkpoint-{step}")
        return time.perf_counter() - began

    def finish(self, step: int, metrics: Metrics) -> None:
        """Waits for the last checkpoint, then completes metrics and report. Collective."""
        self.wait()
        trainer = {
            "step": step,
            "train_config": configs.to_json(self.config),
            "about": self.about,
            "metrics": metrics.summary(),
        }

        def write() -> None:
            self.may_publish()
            self._publish_metrics(metrics.records, trainer)

        self.ranks.first(write)

    def _publish_metrics(self, records: list[dict[str, Any]], trainer: dict[str, Any]) -> None:
        """Logs never block a run: what cannot be written is said, and the run continues."""
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
        def guarded() -> None:
            try:
                write()
            except BaseException as error:  # handed to the training thread by wait()
                self._error = error

        self._thread = threading.Thread(target=guarded, name=name)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint under way is whole. Collective; raises what its writing raised."""
        self.ranks.together(self._join)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
