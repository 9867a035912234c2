"""Work that is repeated while storage is away, by a clock of the test's own."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from nanochat_ray import retry

GONE = OSError("the bucket cannot be reached")


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.sleeps = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


def run(outcomes: Iterator[object], timeout_s: float = 100.0) -> tuple[object, Time]:
    time = Time()

    def work() -> object:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    try:
        clock = lambda: time.now  # noqa: E731
        result = retry.retry(work, "it", timeout_s=timeout_s, clock=clock, sleep=time.sleep)
    except Exception as error:
        return error, time
    return result, time


def test_work_is_repeated_until_it_succeeds() -> None:
    result, time = run(iter([GONE, GONE, GONE, "done"]))
    assert (result, time.sleeps) == ("done", [0.5, 1.0, 2.0])


def test_delays_have_a_limit() -> None:
    delays = retry.backoff()
    assert [next(delays) for _ in range(8)] == [0.5, 1, 2, 4, 8, 15, 15, 15]


def test_the_last_error_is_raised_in_time() -> None:
    # After 0.5 + 1 + 2 s the next delay of 4 s would end behind the 5th second.
    result, time = run(iter([GONE] * 9), timeout_s=5.0)
    assert result is GONE
    assert time.sleeps == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EROFS, "read-only"),
        FileNotFoundError("no such object"),
        PermissionError("forbidden"),
        ValueError("damaged"),
    ],
)
def test_other_errors_are_raised_at_once(error: Exception) -> None:
    assert run(iter([error, "done"]))[0] is error


def test_a_broken_connection_is_an_outage() -> None:
    assert run(iter([ConnectionResetError(errno.ECONNRESET, "reset"), 1]))[0] == 1
