"""Leases on checkpoints that are served, so that training does not delete them.

``runs/<run>/leases/<holder>.json`` names the checkpoints that one holder needs, such as an engine
replica, and the time of its last renewal. ``checkpoint.prune`` keeps what a lease names that is
younger than ``LEASE_S`` by the clock of the machine that prunes: clocks may differ by minutes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Iterable

from nanochat_ray.storage import Store

LEASE_S = 600.0
"""How long a lease lives after its last renewal: a replica that dies may take minutes to return."""
RENEW_S = 30.0
FOLDER = "leases"
_LOG = logging.getLogger(__name__)


class Lease:
    """The lease of one holder; a thread renews it until ``release``.

    Storage that cannot be written is no error: it is logged once.
    """

    def __init__(self, run: Store, holder: str):
        self._run = run
        self._file = f"{FOLDER}/{file_name(holder)}.json"
        self._names: list[str] = []
        self._has_warned = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self, names: Iterable[str]) -> None:
        """Leases these checkpoints and no others."""
        checkpoints = sorted(set(names))
        if checkpoints != self._names:
            self._names = checkpoints
            self._write()
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
            self._thread.start()

    def _renew(self) -> None:
        while not self._end.wait(RENEW_S):
            self._write()

    def _write(self) -> None:
        value = {"checkpoints": self._names, "renewed_at": time.time()}
        try:
            self._run.write_text(self._file, json.dumps(value))
        except OSError as error:
            if not self._has_warned:
                _LOG.warning("checkpoints of %s cannot be leased: %s", self._run.uri, error)
            self._has_warned = True

    def release(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            self._run.delete(self._file)


def file_name(text: str) -> str:
    """``text`` with all but letters, digits, ``_``, ``.`` and ``-`` replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)


def leased_checkpoints(run: Store) -> set[str]:
    """Names of the checkpoints that a live lease names; old leases are deleted."""
    names: set[str] = set()
    for file in run.list(FOLDER):
        try:
            value = json.loads(run.read_bytes(f"{FOLDER}/{file}"))
            renewed_at, checkpoints = float(value["renewed_at"]), list(value["checkpoints"])
        except (OSError, ValueError, TypeError, KeyError):
            continue  # released meanwhile, or no lease
        if time.time() - renewed_at < LEASE_S:
            names.update(map(str, checkpoints))
        else:
            run.delete(f"{FOLDER}/{file}")
    return names
