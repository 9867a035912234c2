"""Tasks of users: what their code raises becomes one line that names task, call, file and line."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from nanochat_ray.checks import short_repr
from nanochat_ray.tasks.task import Task
from nanochat_ray.text.chat import Message

logger = logging.getLogger(__name__)
T = TypeVar("T")
SLOW_S = 60.0
"""After which a grade is late."""


class OwnTask:
    """A user's task under the name that the user gave. Each call raises ValueError as
    ``name_errors`` does. Implements ``Task``."""

    def __init__(self, task: Task, name: str):
        self.task, self.name = task, name

    def __len__(self) -> int:
        return self._call("__len__()", lambda: len(self.task))

    def question(self, index: int) -> list[Message]:
        return self._call(f"question({index})", lambda: self.task.question(index))

    def example(self, index: int) -> list[Message]:
        return self._call(f"example({index})", lambda: self.task.example(index))

    def grade(self, index: int, answer: str) -> bool | float:
        """Warns if it takes a minute: the caller waits for ever."""
        call = f"grade({index}, {short_repr(answer)})"
        warning = f"task={self.name!r} has not returned from {call} after {SLOW_S:g} s"
        timer = threading.Timer(SLOW_S, logger.warning, (warning,))
        timer.daemon = True
        timer.start()
        try:
            return self._call(call, lambda: self.task.grade(index, answer))
        finally:
            timer.cancel()

    def source_digest(self) -> str:
        """SHA-256 (hex) of the file with the task's code; "" if there is none."""
        path = getattr(sys.modules.get(type(self.task).__module__), "__file__", None)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""

    def _call(self, call: str, function: Callable[[], T]) -> T:
        with name_errors(self.name, f"failed in {call}"):
            return function()


@contextmanager
def name_errors(name: str, event: str) -> Iterator[None]:
    """ValueError for any exception in the block, with its type, text, file and line: a user's code
    may raise each, and that of ``int(answer)`` does not say where. The file is the innermost one
    that is neither Python's nor of this folder."""
    try:
        yield
    except Exception as error:
        others = ("<frozen ", os.path.dirname(__file__), sysconfig.get_path("stdlib"))
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(others)]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        raise ValueError(
            f"task={name!r} {event}: {type(error).__name__}: {error}{where}"
        ) from error
