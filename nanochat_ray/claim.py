"""The exclusive right to write one thing of a storage root: a run, a dataset, a tokenizer.

Two jobs that write one folder at the same time would leave a mixture. So a job takes a claim
first: it creates ``claims/<kind>/<name>/<generation>.json``, which only one can do (``Store.
create``: a hard link in a folder, a conditional put in an object store). The highest generation
is the claim. Its owner renews it; a successor does not change it but creates the next
generation, so taking over needs the same one atomic operation.

An owner has lost its claim when its process on this machine is dead (then at once), or when it has
not renewed for ``LEASE`` seconds. It learns of a successor in ``check``, which belongs before
everything that publishes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from nanochat_ray.storage import Store

LEASE = 30.0
"""Seconds without a renewal after which an owner on another machine is taken for dead."""
RENEW_EVERY = 5.0
_LOG = logging.getLogger(__name__)


class ClaimLostError(ValueError):
    """Another job has taken over what this one was writing.

    A ValueError, so that it ends a job with one line, on all its ranks, and restarts nothing.
    """


def machine_id() -> str:
    """Where a process id means something: the host, its boot, and the namespace of the ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who has a claim, as the file says it."""

    token: str
    host: str
    machine: str
    pid: int
    started: float
    """When the process began: ids are used again."""
    renewed: float
    """Seconds since the epoch, on the owner's clock."""
    released: bool = False

    @classmethod
    def here(cls, token: str) -> Owner:
        process = psutil.Process()
        return cls(
            token=token,
            host=socket.gethostname(),
            machine=machine_id(),
            pid=process.pid,
            started=process.create_time(),
            renewed=time.time(),
        )

    @property
    def is_dead(self) -> bool:
        """Its process ran on this machine and does not any more."""
        if self.machine != machine_id():
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 2.0
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    @property
    def runs_here(self) -> bool:
        return self.machine == machine_id()


def _parse(data: bytes) -> Owner | None:
    """None for what is no claim's file: then only its age says whether it is in use."""
    try:
        found: dict[str, Any] = json.loads(data)
        owner = Owner(**found)
        kinds = {"token": str, "host": str, "machine": str, "pid": int, "released": bool}
        sound = all(type(getattr(owner, name)) is kind for name, kind in kinds.items())
        return owner if sound and float(owner.renewed) and float(owner.started) else None
    except (ValueError, TypeError, RecursionError):
        return None


class Claim:
    """A claim that was taken; renewed by a thread until ``release``."""

    def __init__(self, folder: Store, generation: int, owner: Owner, what: str):
        self.folder, self.generation, self.owner, self.what = folder, generation, owner, what
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)
        self._thread.start()

    @property
    def reference(self) -> dict[str, Any]:
        """What another process of the same job needs to ``check_reference``: JSON values."""
        return {
            "uri": self.folder.uri,
            "generation": self.generation,
            "token": self.owner.token,
            "what": self.what,
        }

    def check(self) -> None:
        """ClaimLostError if another job has taken over."""
        check_reference(self.reference)

    def _write(self, owner: Owner) -> None:
        self.folder.write_text(_file(self.generation), json.dumps(asdict(owner)))

    def _renew(self) -> None:
        while not self._over.wait(RENEW_EVERY):
            try:
                self.check()
                self._write(replace(self.owner, renewed=time.time()))
            except ClaimLostError:
                return  # the next check says so
            except Exception as error:  # storage may be away for a moment
                _LOG.warning("the claim on %s could not be renewed: %s", self.what, error)

    def release(self) -> None:
        """Gives the claim back. The file stays, marked, so that generations only grow."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(ClaimLostError, OSError):
            self.check()
            self._write(replace(self.owner, released=True))


def check_reference(reference: dict[str, Any]) -> None:
    """ClaimLostError if the claim of that ``Claim.reference`` is another job's now."""
    folder = Store.at(str(reference["uri"]))
    found = _newest(folder)
    if found is not None and found[0] == reference["generation"]:
        owner = found[1]
        if owner is not None and owner.token == reference["token"] and not owner.released:
            return
    by = f" ({_described(found[1])})" if found and found[1] else ""
    raise ClaimLostError(
        f"another job has taken over {reference['what']}{by}: this one stops without publishing"
    )


def _file(generation: int) -> str:
    return f"{generation:08d}.json"


def _newest(folder: Store) -> tuple[int, Owner | None] | None:
    """The highest generation and its owner; None if nobody has ever hold_claim."""
    numbers = [name.removesuffix(".json") for name in folder.list() if name.endswith(".json")]
    generations = [int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) == 8]
    if not generations:
        return None
    newest = max(generations)
    try:
        return newest, _parse(folder.read_bytes(_file(newest)))
    except FileNotFoundError:
        return newest, None


def _described(owner: Owner) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.started))
    return f"process {owner.pid} on {owner.host}, begun {began}"


def _wait_while_alive(folder: Store, what: str, found: tuple[int, Owner | None]) -> None:
    """Returns when the owner of generation ``found[0]`` is gone. ValueError if it is alive."""
    generation, owner = found
    if owner is not None and (owner.released or owner.is_dead):
        return
    if owner is not None and not owner.runs_here and time.time() - owner.renewed > 10 * LEASE:
        return
    if owner is not None and owner.runs_here:
        raise ValueError(f"{what} is in use: {_described(owner)} is writing it; wait for its end")
    # Of another machine (or damaged): alive if it is renewed. Clocks of machines differ, so what
    # counts is a change that is seen here.
    described = _described(owner) if owner else "an unknown owner"
    _LOG.warning("%s was hold_claim by %s: waiting up to %.0f s", what, described, LEASE)
    deadline = time.monotonic() + LEASE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, LEASE / 10))
        now = _newest(folder)
        if now is None or (now[1] is not None and now[0] == generation and now[1].released):
            return
        if now != found:
            raise ValueError(f"{what} is in use: {described} is writing it; wait for its end")


def acquire(root: Store, kind: str, name: str) -> Claim:
    """Takes the claim on ``<kind>/<name>`` of a storage root.

    Waits ``LEASE`` seconds at most, where an owner of another machine seems to be gone. Raises
    ValueError, naming the owner, if it is alive.
    """
    folder, what = root.child("claims", kind, name), f"{kind}/{name} of {root.uri}"
    owner = Owner.here(uuid.uuid4().hex)
    for _ in range(100):
        found = _newest(folder)
        if found is not None:
            _wait_while_alive(folder, what, found)
        generation = found[0] + 1 if found else 1
        if not folder.create(_file(generation), json.dumps(asdict(owner)).encode()):
            continue  # another was quicker: look who
        for old in range(max(1, generation - 3), generation):
            folder.delete(_file(old))
        claim = Claim(folder, generation, owner, what)
        try:
            claim.check()  # storage without conditional writes lets two create one file
        except ClaimLostError:
            claim.release()
            continue
        return claim
    raise ValueError(f"{what} is in use by several jobs at once; try again")


@contextlib.contextmanager
def hold_claim(root: Store, kind: str, name: str) -> Iterator[Claim]:
    """``acquire``, released when the block ends."""
    claim = acquire(root, kind, name)
    try:
        yield claim
    finally:
        claim.release()
