"""Folders of files in other projects' formats: written atomically, read with every value checked.

A folder that is written has ``export.json``, which names its files. Only a folder in which nothing
else is, so one that an earlier export wrote, is ever replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_ray.checks import short_repr
from nanochat_ray.storage import Store, name_file, sync_folder

MARKER = "export.json"
FORMAT = "nanochat_ray export 1"
JSON_BYTES = 64 << 20
"""Size of a JSON file that is read, at most."""
COPY_BYTES = 16 << 20
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY, MAX_POSITIONS = 10_000, 1 << 20, 1 << 24, 1 << 24
"""Of a model that is read: a damaged number must not ask for a petabyte."""


# --- writing ------------------------------------------------------------------------------------


def check_target(out: Store) -> None:
    """ValueError unless ``out`` can be written: new, empty, or an earlier export and no more."""
    if _entries(out) is None:
        return
    others = sorted(set(_entries(out) or ()) - set(_export_files(out)))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"out={out.uri!r} is not allowed: the folder has {', '.join(others[:3])}{more}, which "
            "no export wrote; give a new or an empty folder"
        )


def _entries(out: Store) -> list[str] | None:
    """Names in the folder; None if there is none. ValueError if it is a file."""
    if out.is_local and os.path.lexists(out.root):
        if not os.path.isdir(out.root):
            raise ValueError(f"out={out.uri!r} is not allowed: it is no folder")
        return sorted(os.listdir(out.root))
    return out.list() or None


def _export_files(out: Store) -> list[str]:
    """Files of an earlier export."""
    if out.is_local and not os.path.isfile(f"{out.root}/{MARKER}"):
        return []
    try:
        marker = json.loads(out.read_text(MARKER))
        return [*marker["files"], MARKER] if marker["format"] == FORMAT else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


@contextlib.contextmanager
def writing(out: Store) -> Iterator[Path]:
    """A local folder whose files become ``out`` when the block ends without error.

    On a disk the new folder takes the place of the old one by a rename. In an object store the
    marker is deleted first and written last. Raises ValueError as ``check_target`` does.
    """
    check_target(out)
    if not out.is_local:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
            _mark(Path(name))
            _upload(Path(name), out)
        return
    target = Path(out.root)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    aside.mkdir()
    old = aside.with_suffix(".old.tmp")
    try:
        yield aside
        _mark(aside)
        check_target(out)  # it may have changed meanwhile
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(aside, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        sync_folder(target.parent)
    except OSError as error:
        name_file(error, out.root)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _mark(folder: Path) -> None:
    files = sorted(path.name for path in folder.iterdir())
    (folder / MARKER).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    for name in (*files, MARKER):  # on the disk before the rename is
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _upload(folder: Path, out: Store) -> None:
    earlier = _export_files(out)
    out.delete(MARKER)
    names = sorted(path.name for path in folder.iterdir() if path.name != MARKER)
    for name in [*names, MARKER]:
        with (folder / name).open("rb") as file, out.writing(name) as stream:
            shutil.copyfileobj(file, stream, COPY_BYTES)
    for name in sorted(set(earlier) - {*names, MARKER}):
        out.delete(name)


# --- reading ------------------------------------------------------------------------------------


@contextlib.contextmanager
def local_copy(uri: str, field: str) -> Iterator[Path]:
    """The folder of ``uri`` on this machine's disk; an object store's is copied there first."""
    store = Store.at(uri)
    if store.is_local:
        if not os.path.isdir(store.root):
            raise ValueError(f"{field}={uri!r} is not allowed: it is no folder")
        yield Path(store.root)
        return
    names = store.list()
    if not names:
        raise ValueError(f"{field}={uri!r} is not allowed: there is nothing")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if "/" in name or not _is_file(store, name):
                continue
            with store.open_input(name) as source, (Path(folder) / name).open("wb") as file:
                shutil.copyfileobj(source, file, COPY_BYTES)
        yield Path(folder)


def _is_file(store: Store, name: str) -> bool:
    try:
        store.size(name)
    except FileNotFoundError:
        return False
    return True


def regular(path: Path, what: str, most: int | None = None) -> int:
    """Bytes of a regular file. ValueError, naming it, for anything else: to read from a FIFO or a
    device may never end."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no {what}: {path.name} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} cannot be read: it is no regular file")
    if most is not None and status.st_size > most:
        raise ValueError(f"{path} cannot be read: {status.st_size:,} bytes, at most {most:,}")
    return status.st_size


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. ValueError names the file."""
    regular(path, what, JSON_BYTES)
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} cannot be read: nested too deep") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} cannot be read: {short_repr(value)} is no JSON object")
    return value


class Fields:
    """The fields of a JSON object, checked by type and range; errors name file and field."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self._path, self._values = path, values

    def _refuse(self, name: str, rule: str) -> ValueError:
        if name not in self._values:
            return ValueError(f"{self._path}: {name} is missing: {rule}")
        value = short_repr(self._values[name])
        return ValueError(f"{self._path}: {name}={value} is not allowed: {rule}")

    def int(self, name: str, most: int, default: int | None = None) -> int:
        """From 1 to ``most``; ``default`` for a field that is missing or null."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise self._refuse(name, f"a whole number from 1 to {most}")
        return value

    def float(self, name: str, most: float, default: float | None = None) -> float:
        """From 0 to ``most``."""
        value = self._values.get(name)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 <= value <= most:  # type: ignore[operator]
            raise self._refuse(name, f"a number from 0 to {most:g}")
        return float(value)  # type: ignore[arg-type]

    def switch(self, name: str) -> bool:
        if type(self._values.get(name)) is not bool:
            raise self._refuse(name, "true or false")
        return bool(self._values[name])

    def equal(self, name: str, *options: Any) -> None:
        """The field, if it is there at all, must be one of ``options``."""
        if name in self._values and not any(
            self._values[name] == value and type(self._values[name]) is type(value)
            for value in options
        ):
            raise self._refuse(name, " or ".join(json.dumps(value) for value in options))

    def object(self, name: str) -> Fields:
        """A nested object; empty if it is missing or null."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._refuse(name, "an object")
        return Fields(self._path, {f"{name}.{k}": v for k, v in (value or {}).items()})

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None
