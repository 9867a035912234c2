"""Processes that start in milliseconds, forked from a server that has loaded torch once."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from tests.tiny import free_ports

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        *("nanochat_ray.train.trainer", "nanochat_ray.cli.train", "pytest", "tests.rl.tiny_rl"),
        "tests.frozen",
    ]
)
REPO = Path(__file__).parents[1]


def have_ended(processes: Iterable[psutil.Process]) -> bool:
    """Counts those whose exit status nobody has collected: in a container nobody may ever do so."""

    def has_ended(process: psutil.Process) -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return all(map(has_ended, processes))


def _run_script(argv: list[str], stdout: Path, stderr: Path) -> None:
    torch.set_num_threads(1)
    os.environ["TERM"] = "dumb"
    sys.stdout, sys.stderr = stdout.open("w"), stderr.open("w")
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_job(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """``python jobs/NAME.py FLAGS`` in a process of its own, without the time of its imports."""
    argv = [str(REPO / "jobs" / f"{name}.py"), *flags]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / "stdout", Path(folder) / "stderr"]
        process = FORKSERVER.Process(target=_run_script, args=(argv, *outputs))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(argv, code, *(file.read_text() for file in outputs))


def _send_result(connection: Connection, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    connection.send(work(*args))


def call(work: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> Any:
    """``work(*args)`` in a process of its own."""
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=_send_result, args=(sender, work, args))
    process.start()
    sender.close()
    try:
        assert receiver.poll(timeout_s), "no result"
        return receiver.recv()
    finally:
        process.kill()
        process.join()
        receiver.close()


def _run_rank(
    rank: int, world: int, port: int, timeout_s: float, work: Callable[..., None], args: Any
) -> None:
    torch.set_num_threads(1)
    # Processes start at different times: none waits for that in a collective with a short limit.
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
    limit = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=limit)
    work(rank, *args)
    dist.destroy_process_group()


def run_on_ranks(
    work: Callable[..., None], *args: Any, world: int = 2, timeout_s: float = 60.0
) -> None:
    """``work(rank, *args)`` on each rank of a process group whose collectives may take
    ``timeout_s``. Fails if it raises on one."""
    (port,) = free_ports(1)
    ranks = [
        FORKSERVER.Process(target=_run_rank, args=(rank, world, port, timeout_s, work, args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
            process.join()
