"""Metric loggers: the progress lines on stdout, TensorBoard, and Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import time
from typing import Any

from nanochat_ray import config as configs
from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.hooks import Hooks
from nanochat_ray.train.metrics import duration

_LOG = logging.getLogger(__name__)

TENSORBOARD_FLUSH_S = 10.0
SLOW_SAVE_S = 30.0
"""A checkpoint that takes longer to write is shown in the progress lines."""
_NO_METRICS = ("kind", "step", "steps", "time")


def check_installed(*, wandb: str) -> None:
    """ValueError if a logger needs a package that is not installed."""
    if wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb={wandb!r} needs the package wandb: pip install nanochat_ray[wandb]"
        )


def metric_loggers(config: TrainerConfig) -> list[Hooks]:
    """The loggers that a configuration names; for rank 0 alone."""
    loggers: list[Hooks] = []
    if config.tensorboard:
        loggers.append(TensorBoardLogger(f"{config.tensorboard}/{config.run}"))
    if config.wandb:
        loggers.append(WandbLogger(config))
    return loggers


def finite_metrics(record: dict[str, Any]) -> dict[str, float]:
    """A record's finite numbers under ``<kind>/<name>``."""
    return {
        f"{record['kind']}/{name}": float(value)
        for name, value in record.items()
        if name not in _NO_METRICS and isinstance(value, int | float) and math.isfinite(value)
    }


class ProgressPrinter(Hooks):
    """Prints a line for every ``every``-th step, and for each validation, sample and checkpoint."""

    def __init__(self, every: int):
        self.every = every

    def on_record(self, record: dict[str, Any]) -> None:
        if should_log(record, self.every):
            print(progress_line(record), flush=True)


class TensorBoardLogger(Hooks):
    """Writes TensorBoard event files into ``folder``. What fails ends the files, not the run.

    tensorboardX's ``SummaryWriter`` is not used: it writes in a thread, which a full disk ends, and
    then waits for ever once the thread's queue is full.
    """

    def __init__(self, folder: str):
        # tensorboardX writes the same files as torch.utils.tensorboard and comes with ray[train].
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.record_writer import directory_check

        directory_check(folder)
        self._folder, self._last_flush = folder, 0.0
        self._writer: Any = EventsWriter(f"{folder}/events")

    def on_record(self, record: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar, text

        summaries = [scalar(name, value) for name, value in finite_metrics(record).items()]
        if record["kind"] == "sample":
            summaries.append(text(record["prompt"], record["text"]))
        now = time.time()
        try:
            for summary in summaries if self._writer is not None else ():
                event = Event(wall_time=now, step=record["step"], summary=summary)
                self._writer.write_event(event)
            if self._writer is not None and now - self._last_flush > TENSORBOARD_FLUSH_S:
                self._last_flush = now
                self._writer.flush()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        """No more is written; the run continues."""
        _LOG.warning("tensorboard: %s: %s: no more is written there", self._folder, error)
        writer, self._writer = self._writer, None
        with contextlib.suppress(OSError):  # what is in its buffer
            writer.close()

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._end(error)


class WandbLogger(Hooks):
    """Logs to a project at Weights & Biases, under the run's own name."""

    def __init__(self, config: TrainerConfig):
        import wandb

        # The name is the identity, so that a resumed run continues its curves.
        self._run = wandb.init(
            project=config.wandb,
            name=config.run,
            id=config.run,
            resume="allow",
            config={"model": configs.to_json(config.model), "train": configs.to_json(config.train)},
        )

    def on_record(self, record: dict[str, Any]) -> None:
        self._run.log(finite_metrics(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def should_log(record: dict[str, Any], every: int) -> bool:
    """Whether a person sees this record: one step in ``every``, the last, and all other kinds."""
    if record["kind"] != "train":
        return True
    last = record["step"] == record["steps"]
    return bool(last or record["step"] % every == 0 or record["skipped"])


def progress_line(record: dict[str, Any]) -> str:
    """One line that a person reads: a training step, a validation, a sample or a checkpoint."""
    at = f"step {record['step']}"
    if record["kind"] == "eval":
        skip = ("kind", "step", "time", "seconds")
        # Figures of single tasks, such as pass@1/chain_sum, are in the report.
        figures = {k: v for k, v in record.items() if k not in skip and "/" not in k}
        values = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
        return f"{at}  validation: {values}  ({record['seconds']:.1f} s)"
    if record["kind"] == "sample":
        reward = f"  (reward {record['reward']:g})" if "reward" in record else ""
        return f"{at}  {record['prompt']!r} → {record['text']!r}{reward}"
    if record["kind"] == "save":
        return f"{at}  checkpoint; training stood still for {record['stall']:.3f} s"
    columns = [f"{at}/{record['steps']}"]
    columns += _rollout_columns(record) if "reward" in record else _loss_columns(record)
    if "mfu" in record:
        columns.append(f"MFU {record['mfu']:.1%}")
    elif "warmup" not in record and "reward" not in record:
        columns.append("MFU unknown")
    wait = record["data_wait"] / record["seconds"]
    waits_for = "rollouts" if "reward" in record else "data wait"
    columns += [f"{waits_for} {wait:.1%}", f"left {duration(record['eta_s'])}"]
    if record.get("save_delay"):
        age = duration(record["checkpoint_age"])
        columns.append(f"STORAGE FAILS: the last checkpoint is {age} old")
    elif record.get("save_pending", 0.0) > SLOW_SAVE_S:
        columns.append(f"a checkpoint is being written for {duration(record['save_pending'])}")
    if record["skipped"]:
        empty = math.isfinite(record["grad_norm"])
        columns.append("SKIPPED: nothing to train on" if empty else "SKIPPED: not finite")
    return "  ".join(columns)


def _loss_columns(record: dict[str, Any]) -> list[str]:
    columns = [
        f"loss {record['loss']:.4f}",
        f"norm {record['grad_norm']:.2f}",
        f"lr ×{record['lr_factor']:.2f}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
    ]
    if "bits_per_byte" in record:
        columns.insert(1, f"bpb {record['bits_per_byte']:.4f}")
    return columns


def _rollout_columns(record: dict[str, Any]) -> list[str]:
    return [
        f"reward {record['reward']:.3f}",
        f"signal {record['groups_with_signal']:.0f}/{record['groups']:.0f}",
        f"length {record['answer_tokens']:.1f}",
        f"truncated {record['truncated_share']:.1%}",
        f"entropy {record['entropy']:.3f}",
        f"|Δlogp| {record['logprob_diff']:.1e}",
        f"norm {record['grad_norm']:.2f}",
        f"lr ×{record['lr_factor']:.2f}",
        f"{record['rollout_tokens_per_s']:,.0f} rollout tokens/s",
    ]
