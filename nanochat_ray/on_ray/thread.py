"""A thread that works while a block of code runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def thread_beside(work: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Runs ``work`` in a thread. When the block ends, its event is set and its end awaited."""
    end = threading.Event()
    thread = threading.Thread(target=work, args=(end,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
