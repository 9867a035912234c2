"""Repeats work on storage that is away for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

FIRST_DELAY_S = 0.5
LAST_DELAY_S = 15.0
OUTAGE_S = 300.0
"""How long work that nobody waits for otherwise is repeated."""
_LOG = logging.getLogger(__name__)


def backoff() -> Iterator[float]:
    """Seconds to wait after each failure: twice as long each time, up to ``LAST_DELAY_S``."""
    delay = FIRST_DELAY_S
    while True:
        yield delay
        delay = min(2 * delay, LAST_DELAY_S)


def reason(error: BaseException) -> str:
    """Its text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_outage(error: OSError) -> bool:
    """Whether storage may be back soon: not for an error of this machine's disk, which has an
    ``errno``, nor for a file that is missing or forbidden."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    return error.errno is None or isinstance(error, ConnectionError | TimeoutError)


def retry(
    work: Callable[[], T],
    what: str,
    *,
    timeout_s: float = OUTAGE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The result of ``work``, repeated for ``timeout_s`` seconds from its first failure while
    storage is away (``is_outage``); then its error is raised. ``what`` names it in the log."""
    deadline = 0.0
    for delay in backoff():
        try:
            return work()
        except OSError as error:
            if not is_outage(error):
                raise
            deadline = deadline or clock() + timeout_s
            if clock() + delay > deadline:
                raise
            _LOG.warning("%s: %s; again in %.1f s", what, reason(error), delay)
        sleep(delay)
    raise AssertionError("backoff is endless")
