"""Damaged copies of a folder, from a seed: what a crash, a bad disk or a wrong tool leaves behind.

``damaged_copies`` yields copies one at a time. ``check_damage`` loads each and fails unless it is
refused in one line that names a file, or gives what the undamaged folder gives::

    check_damage(folder, load, same=lambda value: value == expected, count=200, seed=0)
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

DEEP = 100_000
"""Nesting of the deepest JSON."""
_RAW = "@raw@"
_RAW_VALUES = {
    "an int of 5,000 digits": "9" * 5000,
    f"JSON nested {DEEP:,} deep": "[" * DEEP + "]" * DEEP,
    "NaN": "NaN",
    "Infinity": "Infinity",
    "a lone surrogate": '"\\ud800"',
}
"""JSON values that ``json.dumps`` does not write."""
_VALUES: tuple[Any, ...] = (
    *(None, True, "", "x" * 5000, [], {}, [None], {"a": 1}, [[1]]),
    *(-1, 0, 0.5, 10**9, 2**63, 10**30, 1e308, "../../etc/passwd", "\x00"),
)


class HangError(AssertionError):
    """Loading took longer than its limit."""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a JSON document is, the document itself first."""
    yield at
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        # A long list (a vocabulary) is all of a kind: its ends stand for it.
        items = [(i, value[i]) for i in sorted({0, len(value) // 2, len(value) - 1}) if value]
    for key, child in items:
        yield from _paths(child, (*at, key))


def _with(document: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """``document`` after ``change(container, key)``; the document itself is the container's 0."""
    box = [document]
    container: Any = box
    key: Any = 0
    for step in at:
        container, key = container[key], step
    change(container, key)
    return box[0]


def _json_of(path: Path) -> Any:
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path} is no JSON")
    return json.loads(path.read_text())


def _put_raw(document: Any, at: tuple[Any, ...], raw: str) -> str:
    marked_copy = _with(document, at, lambda box, key: box.__setitem__(key, _RAW))
    return json.dumps(marked_copy).replace(json.dumps(_RAW), raw)


# Each kind of damage changes the folder and says how.


def truncate(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_files(folder))
    size = path.stat().st_size
    keep = rng.choice([0, 1, size // 2, size - 1, rng.randrange(size + 1)])
    os.truncate(path, max(0, keep))
    return f"{path.name} cut to {keep} of {size} bytes"


def extend(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_files(folder))
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 64)))
    return f"{path.name} with bytes after its end"


def flip_bytes(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_files(folder))
    data = bytearray(path.read_bytes())
    offsets = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 8]))] if data else []
    for at in offsets:
        data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.name} with bits flipped at {offsets}"


def random_content(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_files(folder))
    path.write_bytes(rng.randbytes(rng.randint(1, 2000)))
    return f"{path.name} of random bytes"


def delete(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_files(folder))
    path.unlink()
    return f"{path.name} deleted"


def swap(folder: Path, rng: random.Random) -> str:
    files = _files(folder)
    one, two = rng.sample(files, 2) if len(files) > 1 else (files[0], files[0])
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return f"{one.name} and {two.name} swapped"


def wrong_value(folder: Path, rng: random.Random) -> str:
    path, document, at = _some_value(folder, rng)
    value = rng.choice(_VALUES)
    other = _with(document, at, lambda box, key: box.__setitem__(key, value))
    path.write_text(json.dumps(other))
    return f"{path.name}: {_dotted_path(at)} is {repr(value)[:40]}"


def raw_value(folder: Path, rng: random.Random) -> str:
    path, document, at = _some_value(folder, rng)
    name = rng.choice(list(_RAW_VALUES))
    path.write_text(_put_raw(document, at, _RAW_VALUES[name]))
    return f"{path.name}: {_dotted_path(at)} is {name}"


def missing_field(folder: Path, rng: random.Random) -> str:
    path, document, at = _some_value(folder, rng, inside=True)
    if at:
        document = _with(document, at, lambda box, key: box.pop(key))
    path.write_text(json.dumps(document))
    return f"{path.name}: {_dotted_path(at)} left out"


def unknown_field(folder: Path, rng: random.Random) -> str:
    path, document, at = _some_value(folder, rng)
    other = _with(document, at, lambda box, key: box.__setitem__(key, {"unknown": 1}))
    if isinstance(document, dict):
        other = {**document, "unknown": 1}
        at = ()
    path.write_text(json.dumps(other))
    return f"{path.name}: {_dotted_path(at)} with an unknown field"


def wrong_encoding(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_json_files(folder) or _files(folder))
    data = path.read_bytes()
    kind = rng.choice(["invalid UTF-8", "UTF-16", "a byte order mark", "a NUL"])
    at = rng.randrange(len(data) + 1)
    if kind == "UTF-16":
        data = data.decode("utf-8", "replace").encode("utf-16")
    elif kind == "a byte order mark":
        data = b"\xef\xbb\xbf" + data
    else:
        data = data[:at] + (b"\xff\xfe\xc3" if kind == "invalid UTF-8" else b"\x00") + data[at:]
    path.write_bytes(data)
    return f"{path.name} in {kind}"


def special_file(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_files(folder))
    path.unlink()
    kind = rng.choice(["a FIFO", "a folder", "a link to /dev/zero", "a broken link", "a link loop"])
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        targets = {"a link to /dev/zero": "/dev/zero", "a broken link": "/nowhere/at/all"}
        path.symlink_to(targets.get(kind, path.name))
    return f"{path.name} is {kind}"


KINDS: tuple[Callable[[Path, random.Random], str], ...] = (
    *(truncate, extend, flip_bytes, random_content, delete, swap, special_file),
    *(wrong_value, raw_value, missing_field, unknown_field, wrong_encoding, wrong_value),
)


def _json_files(folder: Path) -> list[Path]:
    results = []
    for path in _files(folder):
        with contextlib.suppress(ValueError):
            _json_of(path)
            results.append(path)
    return results


def _some_value(
    folder: Path, rng: random.Random, *, inside: bool = False
) -> tuple[Path, Any, tuple[Any, ...]]:
    """A JSON file, its document, and where in it a value is; ``inside``: not the document."""
    path = rng.choice(_json_files(folder))
    document = _json_of(path)
    offsets = list(_paths(document))
    inner = offsets[1:] if inside else offsets
    return path, document, rng.choice(inner) if inner else ()


def _dotted_path(at: tuple[Any, ...]) -> str:
    return ".".join(map(str, at)) or "the document"


def damaged_copies(
    folder: Path,
    count: int,
    seed: int,
    *,
    reseal: Callable[[Path], None] | None = None,
) -> Iterator[tuple[str, Path]]:
    """``count`` copies of ``folder``, each damaged in one way: (description, path).

    A copy is removed when the next is asked for. All kinds of ``KINDS`` take turns; equal
    arguments give equal damage. A folder without JSON files gets the kinds that need none.
    ``reseal`` may repair checksums after the damage, so that it reaches what lies behind them.
    """
    kinds = KINDS if _json_files(folder) else KINDS[:7]
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        with tempfile.TemporaryDirectory() as base:
            copy = Path(base) / folder.name
            shutil.copytree(folder, copy, symlinks=True)
            kind = kinds[number % len(kinds)]
            description = kind(copy, rng)
            # Reading a FIFO would wait for ever.
            if reseal is not None and kind is not special_file:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                    reseal(copy)
            yield description, copy


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises HangError in the block after ``seconds``. Main thread only."""

    def late(number: int, frame: FrameType | None) -> None:
        raise HangError(f"{what}: still loading after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_damage(
    folder: Path,
    load: Callable[[Path], T],
    *,
    same: Callable[[T], bool],
    count: int,
    seed: int,
    reseal: Callable[[Path], None] | None = None,
    refusals: tuple[type[Exception], ...] = (ValueError,),
    limit: float = 60.0,
) -> Counter[str]:
    """Loads ``count`` damaged copies; fails at the first that hangs, crashes or is another.

    A refusal is one of ``refusals`` (by default ValueError, as a job turns it into one line) whose
    text is one line, under 1,000 characters, that names a file of the folder or the folder.
    Returns how many were "refused" and how many "same" (damage that changes nothing).
    """
    outcomes: Counter[str] = Counter()
    names = [path.name for path in _files(folder)] + [folder.name]
    for description, copy in damaged_copies(folder, count, seed, reseal=reseal):
        try:
            with time_limit(limit, description):
                value = load(copy)
        except refusals as error:
            text = str(error)
            assert "\n" not in text, (description, text)
            assert len(text) < 1000, (description, text[:1000])
            assert any(name in text for name in names), (description, text)
            outcomes["refused"] += 1
            continue
        except HangError:
            raise
        except Exception as error:
            raise AssertionError(f"{description}: {type(error).__name__}: {error}") from error
        assert same(value), f"{description}: loads as something else"
        outcomes["same"] += 1
    return outcomes
