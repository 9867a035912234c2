"""Names of a run's checkpoints, and which of them are complete. Imports no torch."""

from __future__ import annotations

import contextlib

from nanochat_ray.checks import short_repr
from nanochat_ray.storage import Store


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int:
    """ValueError for a name that ``name_of`` does not give."""
    digits = name.removeprefix("step-")
    # Not str.isdigit alone, which takes other scripts' digits and "²" too.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 12):
        digits = ""
    if not digits or name_of(int(digits)) != name:
        text = short_repr(name)
        raise ValueError(f"checkpoint={text} is not allowed: a name such as {name_of(100)}")
    return int(digits)


def names(run: Store) -> list[str]:
    """Folders of checkpoints, complete or not, the newest first; not other names."""
    steps = []
    for name in run.list():
        with contextlib.suppress(ValueError):
            steps.append((step_of(name), name))
    return [name for _, name in sorted(steps, reverse=True)]


def is_complete(run: Store, name: str) -> bool:
    try:
        run.size(f"{name}/manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def latest(run: Store) -> str | None:
    """Name of the newest complete checkpoint, or None if there is none.

    The folders decide, not the file ``latest``, which a crash may have left behind or emptied.
    """
    return next((name for name in names(run) if is_complete(run, name)), None)
