"""Tasks in a pool of processes: results, errors, workers that die."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanochat_ray import container
from nanochat_ray.data.map_tasks import MapTasks, map_in_processes, map_serially
from tests.data.pool_work import die, fail_on_three, square, touch
from tests.processes import have_ended
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "cores", lambda: 2)


def test_processes_give_the_results_of_all_items() -> None:
    results = sorted(map_in_processes(range(9), square), key=lambda result: result["number"])
    assert [result["square"] for result in results] == [n * n for n in range(9)]
    assert os.getpid() not in {result["pid"] for result in results}
    assert list(map_in_processes([7], square)) == list(map_serially([7], square))
    assert list(map_in_processes([], square)) == []


@pytest.mark.slow
@pytest.mark.parametrize("mapping", [map_serially, map_in_processes])
def test_errors_of_tasks_keep_type_and_message(mapping: MapTasks) -> None:
    with pytest.raises(ValueError, match=r"^text file late\.txt is not text$"):
        list(mapping([4, 4], fail_on_three))
    with pytest.raises(OSError, match=r"text file late\.txt is missing$"):
        list(mapping([3, 3], fail_on_three))


def test_a_dead_worker_is_an_error() -> None:
    with pytest.raises(OSError, match="a process of the preparation died"):
        list(map_in_processes([1, 2], die))


def test_an_error_cancels_tasks_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = functools.partial(touch, str(tmp_path))
    cancel = ProcessPoolExecutor.shutdown

    def shutdown(pool: ProcessPoolExecutor, *args: Any, **kwargs: Any) -> None:
        cancel(pool, wait=False, cancel_futures=True)
        (tmp_path / "error").touch()
        cancel(pool, *args, **kwargs)

    monkeypatch.setattr(ProcessPoolExecutor, "shutdown", shutdown)
    with pytest.raises(ValueError, match="item 0"):
        list(map_in_processes(range(60), work))
    # Those that run, and a few that the pool passes on before it cancels the others.
    assert len(list(tmp_path.iterdir())) < 30


def test_interrupted_workers_print_nothing(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import pathlib, sys, time
        from nanochat_ray import container
        from nanochat_ray.data import map_tasks

        def work(item):
            print("started", flush=True)
            while not pathlib.Path(item).exists():
                time.sleep(0.01)
            return {}

        if __name__ == "__main__":
            container.cores = lambda: 2
            try:
                list(map_tasks.map_in_processes(sys.argv[1:] * 100, work))
            except KeyboardInterrupt:
                raise SystemExit(130)
        """)
    )
    marker = tmp_path / "interrupted"
    command = [sys.executable, str(program), str(marker)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        marker.touch()
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import os, threading
        from nanochat_ray import container
        from nanochat_ray.data import map_tasks

        def work(item):
            print(os.getpid(), flush=True)
            threading.Event().wait()
            return {}

        if __name__ == "__main__":
            container.cores = lambda: 2
            list(map_tasks.map_in_processes([1, 2], work))
        """)
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        workers = [psutil.Process(int(p.stdout.readline())) for _ in range(2)]
        p.kill()
    wait_for(lambda: have_ended(workers), what="the workers' end")
