"""Checkpoints while storage fails: which is written, when, and what the trainer learns."""

from __future__ import annotations

import errno
import itertools
import threading

import pytest

from nanochat_ray.train.checkpoint_writer import CheckpointWriter, PendingCheckpoint
from tests.waiting import wait_for


class Storage:
    """Writes that fail while ``error`` is set, and that wait while ``gate`` is not."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.names: list[str] = []
        self.num_attempts = 0

    def pending(self, name: str, *, is_validated: bool = False) -> PendingCheckpoint:
        def write() -> None:
            self.num_attempts += 1
            assert self.gate.wait(30)
            if self.error is not None:
                raise self.error
            self.names.append(name)

        return PendingCheckpoint(name, write, is_validated)


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def writer() -> CheckpointWriter:
    return CheckpointWriter(lambda: itertools.repeat(0.001))


def put(writer: CheckpointWriter, one: PendingCheckpoint) -> None:
    writer.await_attempt()
    writer.put(one)


def test_a_checkpoint_is_written_when_storage_is_back(
    storage: Storage, writer: CheckpointWriter
) -> None:
    storage.error = OSError("away")
    put(writer, storage.pending("a"))
    wait_for(lambda: storage.num_attempts > 2)
    assert writer._pending is not None
    assert not writer.has_error
    assert writer.delay_s > 0
    assert writer.pending_s > 0
    assert writer.last_time is None
    storage.error = None
    writer.await_end(30)
    assert storage.names == ["a"]
    assert writer._pending is None
    assert writer.delay_s == 0
    assert writer.pending_s == 0
    assert writer.last_time is not None


def test_the_newest_checkpoint_replaces_the_others(
    storage: Storage, writer: CheckpointWriter
) -> None:
    storage.error = OSError("away")
    for name in "abc":
        put(writer, storage.pending(name))
        attempts = storage.num_attempts
        wait_for(lambda n=attempts: storage.num_attempts > n)  # type: ignore[misc]
    storage.error = None
    writer.await_end(30)
    assert storage.names[-1] == "c"
    assert "a" not in storage.names


def test_no_periodic_checkpoint_replaces_a_best_one(
    storage: Storage, writer: CheckpointWriter
) -> None:
    assert writer.hold()
    storage.gate.clear()
    put(writer, storage.pending("a"))
    assert not writer.hold()  # it is being written
    storage.error = OSError("away")
    storage.gate.set()
    wait_for(writer.hold)
    put(writer, storage.pending("best", is_validated=True))
    attempts = storage.num_attempts
    wait_for(lambda: storage.num_attempts > attempts + 1)
    assert not writer.hold()
    storage.error = None
    writer.await_end(30)
    assert storage.names == ["best"]


def test_no_attempt_begins_while_on_hold(storage: Storage, writer: CheckpointWriter) -> None:
    storage.error = OSError("away")
    put(writer, storage.pending("a"))
    wait_for(writer.hold)
    num_attempts, storage.error = storage.num_attempts, None
    thread = writer._thread
    assert thread is not None
    thread.join(0.05)  # 50 times the delay between two attempts
    assert (storage.num_attempts, storage.names) == (num_attempts, [])
    put(writer, storage.pending("b"))
    writer.await_end(30)
    assert storage.names == ["b"]


@pytest.mark.parametrize("end", ["release", "give_up", "await_end"])
def test_a_hold_ends(storage: Storage, writer: CheckpointWriter, end: str) -> None:
    storage.error = OSError("away")
    put(writer, storage.pending("a"))
    wait_for(writer.hold)
    thread, storage.error = writer._thread, None
    assert thread is not None
    getattr(writer, end)(*[30.0] * (end == "await_end"))
    thread.join(30)
    assert storage.names == ([] if end == "give_up" else ["a"])


def test_the_end_of_a_run_waits_no_longer_than_that(
    storage: Storage, writer: CheckpointWriter
) -> None:
    storage.error = OSError(errno.ENOSPC, "No space left on device", "/full/x")
    put(writer, storage.pending("checkpoint step-000003"))
    match = r"checkpoint step-000003 could not be written for \d+ s: .*No space left"
    with pytest.raises(OSError, match=match) as caught:
        writer.await_end(0.0)
    assert caught.value.errno == errno.ENOSPC
    assert writer._pending is None


def test_a_slow_write_is_not_given_up(storage: Storage, writer: CheckpointWriter) -> None:
    storage.gate.clear()
    put(writer, storage.pending("a"))
    end = threading.Thread(target=writer.await_end, args=(0.0,))
    end.start()
    storage.gate.set()
    end.join(30)
    assert storage.names == ["a"]


@pytest.mark.parametrize("error", [ValueError("another job"), FloatingPointError("nan")])
def test_other_errors_are_final(
    storage: Storage, writer: CheckpointWriter, error: Exception
) -> None:
    storage.error = error
    put(writer, storage.pending("a"))
    wait_for(lambda: writer.has_error)
    with pytest.raises(type(error), match=str(error)):
        writer.await_attempt()
    assert storage.num_attempts == 1
    storage.error = None
    put(writer, storage.pending("b"))
    writer.await_end(0)
    assert storage.names == ["b"]


def test_a_run_that_fails_leaves_no_thread(storage: Storage, writer: CheckpointWriter) -> None:
    storage.error = OSError("away")
    put(writer, storage.pending("a"))
    thread = writer._thread
    assert thread is not None
    writer.give_up()
    thread.join(30)
    assert not thread.is_alive()
