"""The exclusive right to write one folder of a storage root: a run or a dataset.

Two jobs that write one folder at the same time would mix their files. So a job first acquires a
claim: it creates ``claims/<kind>/<name>/<generation>.json``, in which only one job can succeed
(``Store.create``: a hard link in a folder, a conditional put in an object store). The file of the
highest generation is the claim. Its owner renews it; a successor creates the next generation, so
taking over needs the same single atomic operation.

An owner loses its claim as soon as its process on this machine is dead, or when it has not renewed
for ``LEASE`` seconds. It learns of a successor in ``check``, which it calls before it publishes.
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
"""Seconds without a renewal after which an owner on another machine counts as dead."""
RENEW_EVERY = 5.0
_STORED_NAMES = {"process_start": "started", "renewed_at": "renewed", "is_released": "released"}
"""Fields of ``Owner`` under the names that claim files have."""
_LOG = logging.getLogger(__name__)


class ClaimLostError(ValueError):
    """Another job has taken over the folder that this one was writing.

    A ValueError, so that it ends a job with one line, on all its ranks, without a restart.
    """


def machine_id() -> str:
    """The scope of a process id: the host, its boot, and the namespace of the ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The owner of a claim, as its file names it."""

    token: str
    host: str
    machine: str
    pid: int
    process_start: float
    """Start time of the process (seconds since the epoch): process ids are reused."""
    renewed_at: float
    """Seconds since the epoch, on the owner's clock."""
    is_released: bool = False

    @classmethod
    def here(cls, token: str) -> Owner:
        process = psutil.Process()
        return cls(
            token=token,
            host=socket.gethostname(),
            machine=machine_id(),
            pid=process.pid,
            process_start=process.create_time(),
            renewed_at=time.time(),
        )

    def to_json(self) -> str:
        values = asdict(self)
        return json.dumps({_STORED_NAMES.get(name, name): values[name] for name in values})

    @classmethod
    def from_json(cls, data: bytes) -> Owner | None:
        """None if ``data`` is no owner: then only renewals show whether the claim is in use."""
        names = {old: name for name, old in _STORED_NAMES.items()}
        try:
            values: dict[str, Any] = json.loads(data)
            owner = cls(**{names.get(key, key): values[key] for key in values})
            kinds = {"token": str, "host": str, "machine": str, "pid": int, "is_released": bool}
            is_valid = all(type(getattr(owner, name)) is kind for name, kind in kinds.items())
            times = float(owner.renewed_at) and float(owner.process_start)
        except (ValueError, TypeError, RecursionError):
            return None
        return owner if is_valid and times else None

    def is_alive(self) -> bool | None:
        """Whether its process runs; None if that cannot be seen from here."""
        if self.machine != machine_id():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_start) < 2.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None if _is_hidden(self.pid) else False
        except psutil.AccessDenied:
            return None


def _is_hidden(pid: int) -> bool:
    """Whether it is a process that /proc shows to its own user only (the mount option hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return False  # it was started after /proc was read


class Claim:
    """An acquired claim; a thread renews it until ``release``."""

    def __init__(self, folder: Store, generation: int, owner: Owner, what: str):
        self.folder, self.generation, self.owner, self.what = folder, generation, owner, what
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)
        self._thread.start()

    @property
    def reference(self) -> dict[str, Any]:
        """JSON values with which another process of the same job can ``check_reference``."""
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
        self.folder.write_text(_file(self.generation), owner.to_json())

    def _renew(self) -> None:
        while not self._over.wait(RENEW_EVERY):
            try:
                self.check()
                self._write(replace(self.owner, renewed_at=time.time()))
            except ClaimLostError:
                return  # the next check raises it
            except Exception as error:  # storage may be away for a moment
                _LOG.warning("the claim on %s could not be renewed: %s", self.what, error)

    def release(self) -> None:
        """Releases the claim. The file stays, marked as released, so that generations only grow."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(ClaimLostError, OSError):
            self.check()
            self._write(replace(self.owner, is_released=True))


def check_reference(reference: dict[str, Any]) -> None:
    """ClaimLostError if the claim of that ``Claim.reference`` is another job's now."""
    folder = Store.at(str(reference["uri"]))
    newest = _newest(folder)
    if newest is not None and newest[0] == reference["generation"]:
        owner = newest[1]
        if owner is not None and owner.token == reference["token"] and not owner.is_released:
            return
    by = f" ({_describe(newest[1])})" if newest and newest[1] else ""
    raise ClaimLostError(
        f"another job has taken over {reference['what']}{by}: this one stops without publishing"
    )


def _file(generation: int) -> str:
    return f"{generation:08d}.json"


def _newest(folder: Store) -> tuple[int, Owner | None] | None:
    """The highest generation and its owner; None if there is no generation yet."""
    numbers = [name.removesuffix(".json") for name in folder.list() if name.endswith(".json")]
    generations = [int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) == 8]
    if not generations:
        return None
    newest = max(generations)
    try:
        return newest, Owner.from_json(folder.read_bytes(_file(newest)))
    except FileNotFoundError:
        return newest, None


def _describe(owner: Owner) -> str:
    start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.process_start))
    return f"process {owner.pid} on {owner.host}, started {start}"


def _wait_while_alive(folder: Store, what: str, newest: tuple[int, Owner | None]) -> None:
    """Returns when the owner of generation ``newest[0]`` is gone. ValueError if it is alive."""
    generation, owner = newest
    is_alive = owner.is_alive() if owner is not None else None
    if owner is not None and (owner.is_released or is_alive is False):
        return
    if owner is not None and is_alive:
        raise ValueError(f"{what} is in use: {_describe(owner)} is writing it; wait for its end")
    if owner is not None and time.time() - owner.renewed_at > 10 * LEASE:
        return
    # An owner on another machine or of another user (or a damaged file) is alive if it is renewed.
    # The clocks of machines differ, so only a change that is observed here counts.
    name = _describe(owner) if owner else "an unknown owner"
    _LOG.warning("%s was claimed by %s: waiting up to %.0f s", what, name, LEASE)
    deadline = time.monotonic() + LEASE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, LEASE / 10))
        now = _newest(folder)
        if now is None or (now[1] is not None and now[0] == generation and now[1].is_released):
            return
        if now != newest:
            raise ValueError(f"{what} is in use: {name} is writing it; wait for its end")


def acquire(root: Store, kind: str, name: str) -> Claim:
    """Acquires the claim on ``<kind>/<name>`` of a storage root.

    Waits at most ``LEASE`` seconds where an owner on another machine seems to be gone. Raises
    ValueError, naming the owner, if it is alive.
    """
    folder, what = root.child("claims", kind, name), f"{kind}/{name} of {root.uri}"
    owner = Owner.here(uuid.uuid4().hex)
    for _ in range(100):
        newest = _newest(folder)
        if newest is not None:
            _wait_while_alive(folder, what, newest)
        generation = newest[0] + 1 if newest else 1
        if not folder.create(_file(generation), owner.to_json().encode()):
            continue  # another job was faster
        for old in range(max(1, generation - 3), generation):
            folder.delete(_file(old))
        claim = Claim(folder, generation, owner, what)
        try:
            claim.check()  # without conditional writes two jobs can create one file
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
