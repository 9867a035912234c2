"""Training by Ray Train: the same ``Trainer`` in every worker, its batches from Ray Data.

Checkpoints are the run's own (``checkpoint.checkpoint``), so a run may start under Ray and resume
without it. Ray restarts the worker group when a worker dies, with fewer workers if it may; the new
group resumes from the run's latest checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.train
import torch
from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.claim import check_reference, hold_claim
from nanochat_ray.on_ray import session
from nanochat_ray.on_ray.coordinator import hold_coordinator
from nanochat_ray.on_ray.data_loader import RayDataLoader
from nanochat_ray.on_ray.interface import NodeTorchConfig
from nanochat_ray.on_ray.stop_flag import StopFlag
from nanochat_ray.on_ray.thread import thread_beside
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.data_loader import open_dataset
from nanochat_ray.train.hooks import Hooks
from nanochat_ray.train.loggers import ProgressPrinter
from nanochat_ray.train.preflight import check, check_workers
from nanochat_ray.train.source import DatasetSource, Source
from nanochat_ray.train.stop import StopOnSignal
from nanochat_ray.train.trainer import Trainer

NOT_NEEDED = (DatasetsCallback, PlacementGroupCleanerCallback)
"""Callbacks of Ray Train that ``RayTrainer`` does without."""
FINAL = (ValueError, FloatingPointError, PermissionError, FileNotFoundError)
"""Errors that a restart would repeat: the group is not restarted. Others may be those of a machine
or a network, and the run resumes from its latest checkpoint."""
FINAL_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of the operating system that a restart would repeat."""
GAUGES = {
    "step": "Steps done.",
    "steps": "Steps of the complete run.",
    "loss": "Training loss, nats per token.",
    "bits_per_byte": "Bits per byte of the validation split.",
    "tokens_per_s": "Tokens per second of all workers.",
    "mfu": "Share of the peak FLOP/s.",
    "grad_norm": "Global gradient norm before clipping.",
    "data_wait": "Seconds that the last step waited for data.",
    "stall": "Seconds that the last checkpoint stalled training.",
    "reward": "Mean reward of the last step's answers.",
    "groups_with_signal": "Groups of the last step whose answers have different rewards.",
    "answer_tokens": "Mean tokens of an answer.",
    "truncated_share": "Share of answers that reached their token limit.",
    "entropy": "Nats per sampled token.",
    "logprob_diff": "Largest difference of log-probabilities between trainer and engine.",
    "rollout_tokens_per_s": "Sampled tokens per second of all engines.",
    "error_rate": "1 - pass@1 of the validation questions.",
    "checkpoint_timestamp_seconds": "Unix time of the last checkpoint that is written.",
    "save_pending": "Seconds since the checkpoint was taken that is being written.",
    "save_delay": "Seconds for which storage has refused checkpoints.",
}


def _on_this_node() -> NodeAffinitySchedulingStrategy:
    node = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(node, soft=False)


@contextlib.contextmanager
def _poll_flag(flag: Any, interval_s: float = 0.5) -> Iterator[Callable[[], bool]]:
    """A function that returns at once what a thread last read from the flag."""
    stop = threading.Event()

    def poll(end: threading.Event) -> None:
        while not end.wait(interval_s) and not stop.is_set():
            # The driver, and the flag with it, may be gone: then nobody stops the run.
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(flag.is_stopping.remote(), timeout=10):
                    stop.set()

    with thread_beside(poll, "stop-flag"):
        yield stop.is_set


@contextlib.contextmanager
def _stop_on_signal(flag: Any) -> Iterator[None]:
    """While entered, SIGTERM (``ray job stop`` sends it) or Ctrl-C to this process sets the
    flag."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with StopOnSignal() as on_signal:

        def forward(end: threading.Event) -> None:
            # Not from the handler itself, which may interrupt Ray in the middle of a call.
            while not end.wait(0.2):
                if on_signal.stop.is_set():
                    ray.get(flag.stop.remote())
                    return

        with thread_beside(forward, "stop-on-signal"):
            yield


class PrometheusLogger(Hooks):
    """Exports each record to Prometheus as ``ray_nanochat_train_<name>``."""

    def __init__(self, run: str):
        self._run = run
        self._gauges = {
            name: Gauge(f"nanochat_train_{name}", description=text, tag_keys=("run",))
            for name, text in GAUGES.items()
        }

    def on_record(self, record: dict[str, Any]) -> None:
        # A training step's own bits per byte would be drawn into the validation's curve.
        skip = {"bits_per_byte"} if record["kind"] == "train" else set()
        if "checkpoint_age" in record:
            timestamp = time.time() - record["checkpoint_age"]
            record = {**record, "checkpoint_timestamp_seconds": timestamp}
        for name in (set(self._gauges) & set(record)) - skip:
            self._gauges[name].set(float(record[name]), tags={"run": self._run})


class WorkerHooks(Hooks):
    """What Ray and the driver want of a worker: to stop, to save, to leave a run to its owner."""

    def __init__(self, should_stop: Callable[[], bool], claim: Any):
        self._should_stop, self._claim = should_stop, claim
        self._preemption_handled = False

    def should_stop(self) -> bool:
        return self._should_stop()

    def should_save(self) -> bool:
        # Once: when the machine is gone, Ray starts a new group from that checkpoint.
        if self._preemption_handled or ray.train.get_preemption_info() is None:
            return False
        self._preemption_handled = True
        return True

    def check_publish(self) -> None:
        check_reference(self._claim)


class NoRetry(UserCallback):
    """Ends a run at the first error that a restart would repeat; prints the others."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        errors: dict[int, Any] = {
            # Ray's holder of an error and its trace
            rank: getattr(error, "_base_exc", error)
            for rank, error in sorted(worker_exceptions.items())
        }
        for error in errors.values():
            if isinstance(error, FINAL) or getattr(error, "errno", None) in FINAL_ERRNO:
                raise error  # Ray Train does not restart after an error in a callback
        for rank, error in errors.items():
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"worker {rank} failed: {text}", flush=True)


class RayTrainer(TorchTrainer):
    """Without what a run does not need.

    Ray's handler of SIGINT aborts the workers, which then save nothing: ``_stop_on_signal`` has one
    that lets them.

    Its ``PlacementGroupCleaner`` frees the workers' resources when the controller has died and the
    driver goes on, while ``fit`` fails then, and the resources are freed when its process ends. It
    looks at the controller once a second through the dashboard: where there is none, it prints a
    warning every second and delays the end of the run.

    Its ``DatasetsCallback`` starts an actor even without datasets, for which the workers wait.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # of Ray 2.60
        return [callback for callback in callbacks if not isinstance(callback, NOT_NEEDED)]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Keeps the handler that is set."""


def _worker(values: dict[str, Any]) -> None:
    """One worker of the group: a ``Trainer``."""
    torch.set_num_threads(int(values["threads"]))
    # Ray's reports about itself, which Ray Train would print.
    logging.getLogger().setLevel(logging.WARNING)
    session.quiet_data()
    config = TrainerConfig.from_json(values["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    source: Source | None = None
    if values["make_source"] is not None:
        source = values["make_source"](config)
    elif values["ray_data"]:
        dataset, manifest, _ = open_dataset(config.storage, config.dataset)
        loader = RayDataLoader(dataset, manifest, config.train, rank, world)
        source = DatasetSource(config, loader)
    loggers: list[Hooks] = []
    if rank == 0:
        loggers = [PrometheusLogger(config.run), ProgressPrinter(values["print_every"])]
    with _poll_flag(values["stop"]) as should_stop:
        trainer = Trainer(
            config,
            device=ray.train.torch.get_device(),
            local_world_size=context.get_local_world_size(),
            source=source,
            hooks=[*loggers, WorkerHooks(should_stop, values["claim"])],
        )
        trainer.run()


def fit(
    config: TrainerConfig,
    *,
    workers: int,
    min_workers: int = 0,
    gpus: bool = False,
    threads: int = 1,
    cpus_per_worker: float = 1.0,
    max_failures: int = 3,
    print_every: int = 10,
    ray_data: bool = True,
    make_source: Callable[[TrainerConfig], Source] | None = None,
) -> dict[str, Any]:
    """Trains ``config`` on ``workers`` processes; returns the metrics of its latest checkpoint.

    Without ``ray_data`` each worker reads the shards itself: the same batches. ``make_source`` is
    called on each worker and replaces the configuration's dataset, which is then not checked.
    With ``min_workers`` the group may be as small as that while machines are missing, and grows
    again when they are back; the batches stay the same. ``done`` is false in the result if the run
    was stopped by SIGTERM or Ctrl-C. Raises ValueError for a configuration that cannot run,
    FloatingPointError for a run that diverged, and what Ray Train raises if workers fail more than
    ``max_failures`` times (machines whose preemption was announced do not count).
    """
    if make_source is None:
        config = check(config, on_gpu=gpus)
    ray_data = ray_data and make_source is None
    check_workers(config, workers, min_workers)
    run = Store.at(config.storage).child("runs", config.run)
    if _completed_steps(run) < config.train.steps:
        with hold_claim(Store.at(config.storage), "runs", config.run) as claim:
            # On the driver's node: it is of no use when that one is gone.
            flag_actor = ray.remote(num_cpus=0)(StopFlag)
            flag = flag_actor.options(scheduling_strategy=_on_this_node()).remote()
            values = {
                "config": config.to_json(),
                "threads": threads,
                "print_every": print_every,
                "ray_data": ray_data,
                "make_source": make_source,
                "stop": flag,
                "claim": claim.reference,
            }
            number: Any = (min_workers, workers) if min_workers else workers
            scaling = ScalingConfig(
                num_workers=number,
                use_gpu=gpus,
                resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if gpus else {})},
            )
            if min_workers:
                # How long Ray waits for what a node that was just lost still seems to have: it
                # looks at the nodes every 20 s.
                os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
            if ray_data or min_workers:
                hold_coordinator()
            trainer = _torch_trainer(run, values, scaling, max_failures)
            with _stop_on_signal(flag):
                _run_ray_trainer(trainer)
    state = checkpoint.load_trainer(run)
    is_complete = _completed_steps(run) >= config.train.steps
    return {**state["metrics"], "step": state["step"], "done": is_complete}


def _completed_steps(run: Store) -> int:
    """Steps up to the run's latest checkpoint."""
    name = checkpoint.latest(run)
    return checkpoint.step_of(name) if name else 0


def _torch_trainer(
    run: Store,
    values: dict[str, Any],
    scaling: ScalingConfig,
    max_failures: int,
) -> RayTrainer:
    """Ray's trainer, which starts ``_worker(values)`` on each worker of the group."""
    # How often the controller asks if its workers are alive.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Ray Train would print every line of a worker a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if session.has_started_ray():
        # Nobody announces to this Ray that its only machine ends.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray_folder = run.child("ray")
    return RayTrainer(
        _worker,
        train_loop_config=values,
        # Long enough for data that stalls: a dead worker is noticed by its connections.
        torch_config=NodeTorchConfig(backend="nccl" if scaling.use_gpu else "gloo", timeout_s=1800),
        scaling_config=scaling,
        run_config=RunConfig(
            name="train",
            storage_path=ray_folder.root,
            storage_filesystem=None if ray_folder.is_local else ray_folder.fs,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[NoRetry()],  # type: ignore[list-item]  # ray.train shows mypy its old API
            # Its log files have all of it; on the terminal an error is one line.
            logging_config=LoggingConfig(log_level="CRITICAL"),  # type: ignore[call-arg]
        ),
    )


def _run_ray_trainer(trainer: RayTrainer) -> None:
    """Runs Ray's trainer. Raises what ``NoRetry`` raised, without Ray's wrapping."""
    try:
        trainer.fit()
    except ControllerError as error:
        failure: BaseException = error
        while isinstance(failure, ControllerError):
            failure = failure.controller_failure
        raise failure from None
