"""Where the tasks of a preparation run: the contract ``MapTasks``, and a pool of processes.

``data/prepare.py`` starts no process itself: its caller passes a ``MapTasks``. That is
``map_in_processes`` of this file on one machine, or ``on_ray/tasks.py`` on a cluster.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Protocol

from nanochat_ray import container

TaskResult = dict[str, Any]
Work = Callable[[Any], TaskResult]
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}


class MapTasks(Protocol):
    def __call__(self, plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
        """The results of ``work`` on each item of ``plan``, in the order of completion.

        Items and results are JSON values. ``work`` can be pickled; its result depends on the item
        only, so that it does not matter where and in which order tasks run. A ValueError or
        OSError of ``work`` is raised here with its message; tasks that wait are then cancelled.
        """
        ...


def run_task(work: Work, item: str) -> str:
    """``work`` of an item, both as JSON. A ValueError or OSError becomes a result.

    Process pools and Ray Data would wrap an exception, lose its cause, or print its traceback.
    """
    try:
        result = work(json.loads(item))
    except tuple(_ERRORS.values()) as error:
        kind = "OSError" if isinstance(error, OSError) else "ValueError"
        result = {"error": [kind, str(error)]}
    return json.dumps(result)


def parse_result(text: str) -> TaskResult:
    """The result of ``run_task``. Raises the ValueError or OSError of the task."""
    result: TaskResult = json.loads(text)
    if "error" in result:
        kind, message = result["error"]
        raise _ERRORS[kind](message)
    return result


def map_serially(plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
    """``MapTasks`` in this process, one task after the other."""
    for item in plan:
        yield parse_result(run_task(work, json.dumps(item)))


def map_in_processes(plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
    """``MapTasks`` by one process for each core that this one may use."""
    count = min(container.cores(), len(plan))
    if count < 2:
        yield from map_serially(plan, work)
        return
    # A fork would copy locks that threads of this process may hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _start_worker, (work,)) as pool:
        try:
            futures = [pool.submit(_run_in_worker, item) for item in map(json.dumps, plan)]
            for future in as_completed(futures):
                yield parse_result(future.result())
        except BrokenProcessPool:
            raise OSError(
                "a process of the preparation died, perhaps for lack of memory; run it again"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_worker_work: Work | None = None
"""The work of this worker process: sent once, not with every item."""


def _start_worker(work: Work) -> None:
    global _worker_work
    _worker_work = work
    # Ctrl-C is for the parent, which then cancels what waits; a worker would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    """Without this a worker whose parent was killed would wait for items for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run_in_worker(item: str) -> str:
    assert _worker_work is not None
    return run_task(_worker_work, item)
