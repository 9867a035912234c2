"""Storage that fails when a test says so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nanochat_ray import retry
from nanochat_ray.storage import Store


class Outage:
    """Makes operations of every ``Store`` raise ``error`` while ``is_on``; ``only`` names the paths
    below which they do.

    A file that is written when ``after_bytes`` is set fails after so many bytes, as an upload does
    whose server is killed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.is_on = False
        self.only = ""
        self.error: Callable[[], OSError] = lambda: OSError("the bucket cannot be reached")
        self.after_bytes: int | None = None
        self.num_failures = 0
        self.most_failures = 0
        """After which storage is back; 0: when ``is_on`` is False."""
        for name in ("create", "list", "size", "delete", "exists"):
            monkeypatch.setattr(Store, name, self._fails(getattr(Store, name)))
        monkeypatch.setattr(Store, "writing", self._writing(Store.writing))
        monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.001)
        monkeypatch.setattr(retry, "LAST_DELAY_S", 0.001)

    def _fail(self) -> None:
        self.num_failures += 1
        raise self.error()

    def _applies(self, store: Store) -> bool:
        is_over = 0 < self.most_failures <= self.num_failures
        return self.is_on and not is_over and self.only in store.root

    def _fails(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(store: Store, *args: Any) -> Any:
            if self._applies(store):
                self._fail()
            return real(store, *args)

        return operation

    def _writing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def writing(store: Store, name: str) -> Iterator[Any]:
            if self._applies(store) and self.after_bytes is None:
                self._fail()
            with real(store, name) as file:
                yield _File(file, self) if self._applies(store) else file

        return writing


class _File:
    def __init__(self, file: Any, outage: Outage):
        self._file, self._outage, self._size = file, outage, 0

    def write(self, data: Any) -> int:
        self._size += len(memoryview(data).cast("B"))
        if self._outage.after_bytes is not None and self._size > self._outage.after_bytes:
            self._outage._fail()
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
