"""Training by Ray Train: the same ``execute`` in every worker, fed by Ray Data.

The run's checkpoints are its own (``checkpoint.checkpoint``), so a run may be begun under Ray and
resumed without it. Ray restarts the group when a worker dies, with fewer workers if it may; the
new group looks up where the run stands and goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.data
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
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.metrics import Gauge

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.claim import check_reference, hold_claim
from nanochat_ray.on_ray.feed import RankedRows, from_iterator
from nanochat_ray.storage import Store
from nanochat_ray.train.job import TrainJob, check, execute, open_dataset
from nanochat_ray.train.metrics import progress_line, wanted
from nanochat_ray.train.stop import StopOnSignal

FINAL = (ValueError, FloatingPointError, PermissionError, FileNotFoundError)
"""Errors that would come again: the group is not restarted. Others may be those of a machine or a
network, and the run continues from its last checkpoint."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of the operating system that would come again too."""
GAUGES = {
    "loss": "Training loss, nats per token.",
    "bits_per_byte": "Bits per byte of held-out text.",
    "tokens_per_s": "Tokens per second of all workers.",
    "mfu": "Share of the peak FLOP/s.",
    "grad_norm": "Global gradient norm before clipping.",
    "data_wait": "Seconds that the last step waited for data.",
    "stall": "Seconds that the last checkpoint held training up.",
}


class StopFlag:
    """The driver's word to the workers that the run is to stop."""

    def __init__(self) -> None:
        self._asked = False

    def ask(self) -> None:
        self._asked = True

    def asked(self) -> bool:
        return self._asked


@contextlib.contextmanager
def _polled(flag: Any, every: float = 0.5) -> Iterator[Callable[[], bool]]:
    """A function that tells at once what a thread has last heard of the flag."""
    asked, over = threading.Event(), threading.Event()

    def poll() -> None:
        while not over.wait(every) and not asked.is_set():
            # The driver may be gone, and its flag with it: then nobody asks any more.
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(flag.asked.remote(), timeout=10):
                    asked.set()

    thread = threading.Thread(target=poll, name="stop-flag", daemon=True)
    thread.start()
    try:
        yield asked.is_set
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _told_by_signal(flag: Any) -> Iterator[None]:
    """While entered, SIGTERM to this process sets the flag (``ray job stop`` sends it)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()
    with StopOnSignal(signal.SIGTERM) as stop:

        def tell() -> None:
            # Not from the handler itself, which may interrupt Ray in the middle of a call.
            while not over.wait(0.2):
                if stop.asked.is_set():
                    ray.get(flag.ask.remote())
                    return

        thread = threading.Thread(target=tell, name="told-by-signal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _gauges(run: str) -> Callable[[dict[str, Any]], None]:
    """A function that shows each record to Prometheus as ``ray_nanochat_train_<name>``."""
    shown = {
        name: Gauge(f"nanochat_train_{name}", description=text, tag_keys=("run",))
        for name, text in {"step": "Steps done.", **GAUGES}.items()
    }

    def show(record: dict[str, Any]) -> None:
        # A training step's own bits per byte would be drawn into the validation's curve.
        skipped = {"bits_per_byte"} if record["kind"] == "train" else set()
        for name in (set(shown) & set(record)) - skipped:
            shown[name].set(float(record[name]), tags={"run": run})

    return show


class NoRetry(UserCallback):
    """Ends a run at the first error that another attempt would only repeat; names the others."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        errors: dict[int, Any] = {
            # Ray's holder of an error and its trace
            rank: getattr(error, "_base_exc", error)
            for rank, error in sorted(worker_exceptions.items())
        }
        for error in errors.values():
            if isinstance(error, FINAL) or getattr(error, "errno", None) in FULL:
                raise error  # an error in a callback is never tried again
        for rank, error in errors.items():
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"worker {rank} failed: {text}", flush=True)


def _worker(values: dict[str, Any]) -> None:
    torch.set_num_threads(int(values["threads"]))
    job = TrainJob.from_json(values["job"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    batches = None
    if values["ray_data"]:
        shard = ray.train.get_dataset_shard("train")
        batches = from_iterator(shard, job.train, rank, world)
    show = _gauges(job.run) if rank == 0 else lambda record: None
    preempted = False

    def report(record: dict[str, Any]) -> None:
        show(record)
        if rank == 0 and wanted(record, values["print_every"]):
            print(progress_line(record), flush=True)

    def should_save() -> bool:
        # Once: when the machine is gone, Ray starts a group anew from that checkpoint.
        nonlocal preempted
        if preempted or ray.train.get_preemption_info() is None:
            return False
        preempted = True
        return True

    with _polled(values["stop"]) as should_stop:
        result = execute(
            job,
            rank=rank,
            world=world,
            sharing=context.get_local_world_size(),
            device=ray.train.torch.get_device(),
            batches=batches,
            report=report,
            should_stop=should_stop,
            should_save=should_save,
            may_publish=lambda: check_reference(values["claim"]),
        )
    ray.train.report(result)


def fit(
    job: TrainJob,
    *,
    workers: int,
    min_workers: int = 0,
    gpus: bool = False,
    threads: int = 1,
    cpus_per_worker: float = 1.0,
    max_failures: int = 3,
    print_every: int = 10,
    ray_data: bool = True,
) -> dict[str, Any]:
    """Trains ``job`` on ``workers`` processes and returns what its last checkpoint says of it.

    Without ``ray_data`` each worker reads the shards itself: the same batches.
    With ``min_workers`` the group may be as small as that while machines are missing, and grows
    again when they are back; the batches stay the same. ``done`` is false in what is returned if
    the run was stopped by SIGTERM. Raises ValueError for a job that cannot run, FloatingPointError
    for one that diverged, and what Ray Train raises if the workers fail more than ``max_failures``
    times (machines that Ray was told would go do not count).
    """
    job = check(job)
    check_workers(job, workers, min_workers)
    dataset, manifest, _ = open_dataset(job.storage, job.dataset)
    run = Store.at(job.storage).child("runs", job.run)
    own = run.child("ray")

    def reached() -> int:
        name = checkpoint.latest(run)
        return checkpoint.step_of(name) if name else 0

    def result() -> dict[str, Any]:
        saved = checkpoint.load_trainer(run)
        return {**saved["metrics"], "step": saved["step"], "done": reached() >= job.train.steps}

    if reached() >= job.train.steps:
        return result()

    with hold_claim(Store.at(job.storage), "runs", job.run) as claim:
        # How often the controller asks if its workers are alive, which a report waits for.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        # Ray Train would print every line of a worker a second time.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
        number: Any = (min_workers, workers) if min_workers else workers
        flag = ray.remote(num_cpus=0)(StopFlag).remote()
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "job": job.to_json(),
                "threads": threads,
                "print_every": print_every,
                "ray_data": ray_data,
                "stop": flag,
                "claim": claim.reference,
            },
            # Long enough for data that stalls: a dead worker is noticed by its connections.
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=1800),
            scaling_config=ScalingConfig(
                num_workers=number,
                use_gpu=gpus,
                resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if gpus else {})},
            ),
            datasets={"train": lambda: ray.data.from_items([{"start": reached()}])}
            if ray_data
            else {},
            dataset_config=RankedRows(dataset.uri, manifest, job.train) if ray_data else None,
            run_config=RunConfig(
                name="train",
                storage_path=own.root,
                storage_filesystem=None if own.is_local else own.fs,
                failure_config=FailureConfig(max_failures=max_failures),
                callbacks=[NoRetry()],  # type: ignore[list-item]  # ray.train shows mypy its old API
                # Its log files have all of it; a refusal is to be one line.
                logging_config=LoggingConfig(log_level="CRITICAL"),  # type: ignore[call-arg]
            ),
        )
        try:
            with _told_by_signal(flag):
                trainer.fit()
        except ControllerError as error:
            # What NoRetry raised, out of the callback's own wrapping.
            failure: BaseException = error
            while isinstance(failure, ControllerError):
                failure = failure.controller_failure
            raise failure from None
        return result()


def check_workers(job: TrainJob, workers: int, min_workers: int) -> None:
    """ValueError if the numbers of workers make no sense together."""
    if not 0 <= min_workers <= workers:
        raise ValueError(f"min_workers={min_workers} is not allowed: from 0 to workers={workers}")
    if job.train.global_batch_size < workers:
        raise ValueError(
            f"workers={workers} is not allowed: at most "
            f"global_batch_size={job.train.global_batch_size}, or some would have nothing to do"
        )
