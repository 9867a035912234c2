"""Tasks by name: a new task is one line in ``_FACTORIES``.

A task's name may carry options: ``chain_sum,min_terms=4,max_terms=4``. Beside the names here it may
be that of any data set of reasoning-gym, or the import path of a ``TaskFactory`` such as
``my_package.my_tasks.Riddles``, installed or in the current folder.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from nanochat_ray.checks import require
from nanochat_ray.tasks import hub
from nanochat_ray.tasks.dialogue import Dialogue
from nanochat_ray.tasks.identity import Identity
from nanochat_ray.tasks.limits import Limits
from nanochat_ray.tasks.own import OwnTask, name_errors
from nanochat_ray.tasks.reasoning import KINDS, ReasoningTask
from nanochat_ray.tasks.spoken import FollowUps, SpokenArithmetic, SpokenLegs
from nanochat_ray.tasks.stories import Stories
from nanochat_ray.tasks.task import Split, Task, TaskFactory

DEFAULT_MIXTURE = (
    "chain_sum:3000",
    "spoken_sums:1500",
    "leg_counting:2000",
    "spoken_legs:1000",
    "products:2000",
    "spoken_products:700",
    "spoken_quotients:600",
    "follow_ups:600",
    "stories:1000",
    "identity:1800",
    "limits:1500",
    "dialogue:1500",
)
"""Conversations of the default fine-tuning, as task:count; all are generated offline."""
Arguments = tuple[Split, int | None, int]
"""Split, size and seed."""
Options = dict[str, Any]
_FACTORIES: dict[str, TaskFactory] = {
    **{name: functools.partial(ReasoningTask, name) for name in KINDS},
    **{name: functools.partial(hub.HubTask, name) for name in hub.NAMES},
    "identity": Identity,
    "limits": Limits,
    "dialogue": Dialogue,
    "spoken_legs": SpokenLegs,
    "follow_ups": FollowUps,
    "stories": Stories,
    "spoken_quotients": functools.partial(SpokenArithmetic, "quotients"),
    "spoken_products": functools.partial(SpokenArithmetic, "products"),
    "spoken_sums": functools.partial(SpokenArithmetic, "chain_sum"),
}


def names() -> list[str]:
    return sorted(_FACTORIES)


def parse_name(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``name,key=value,…``. Values that are JSON become what they say, others
    strings. ValueError for an option without a value."""
    name, *entries = text.split(",")
    options: dict[str, Any] = {}
    for entry in entries:
        key, sign, value = entry.partition("=")
        requirement = "options behind a name are key=value, such as chain_sum,min_terms=4"
        require(bool(sign) and key.isidentifier(), "task", text, requirement)
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def make_task(name: str, split: Split, size: int | None = None, seed: int = 0) -> Task:
    """The task of a name, with options, with at most ``size`` examples. ValueError for an unknown
    name or option."""
    base, options = parse_name(name)
    factory = _FACTORIES.get(base)
    if factory is None and "." in base:
        return _own_task(_import_factory(base), name, (split, size, seed), options)
    if factory is None:
        from reasoning_gym.factory import DATASETS

        if base not in DATASETS:
            raise ValueError(
                f"task={base!r} is not known: one of {', '.join(names())}, a data set of "
                "reasoning-gym, or the import path of a task of your own, package.module.Task"
            )
        factory = functools.partial(ReasoningTask, base)
    _check_options(factory, name, (split, size, seed), options)
    try:
        task = factory(split, size, seed, **options)
    except TypeError as error:
        if not options:  # a defect of the program
            raise
        raise ValueError(f"task={name!r} has an unknown or wrong option: {error}") from error
    task.name = name
    return task


def _own_task(factory: TaskFactory, name: str, arguments: Arguments, options: Options) -> Task:
    """ValueError for what makes no ``Task``."""
    _check_options(factory, name, arguments, options)
    with name_errors(name, "cannot be created"):
        task = factory(*arguments, **options)
    methods = ("__len__", "question", "example", "grade")
    missing = [method for method in methods if not callable(getattr(task, method, None))]
    rule = f"a Task of tasks/task.py, which also has {', '.join(missing)}"
    require(not missing, "task", name, rule)
    return OwnTask(task, name)


def _check_options(factory: TaskFactory, name: str, arguments: Arguments, options: Options) -> None:
    """ValueError for options that it does not take."""
    rule = "a class or function that takes (split, size, seed) and its options"
    require(callable(factory), "task", name, rule)
    try:
        inspect.signature(factory).bind(*arguments, **options)
    except TypeError as error:
        rule = f"it takes (split, size, seed) and its own options: {error}"
        raise ValueError(f"task={name!r} is not allowed: {rule}") from None


def make_tasks(names: Sequence[str], split: Split, size: int | None, seed: int) -> list[Task]:
    """The tasks of ``names``. ValueError also for one that has no questions in the split."""
    tasks = [make_task(name, split, size=size, seed=seed) for name in names]
    for task in tasks:
        if not len(task):
            raise ValueError(f"tasks={task.name!r} has no questions in the split {split}")
    return tasks


def _import_factory(path: str) -> TaskFactory:
    module_name, _, attribute = path.rpartition(".")
    if not {"", os.getcwd()} & set(sys.path):
        # An installed command has the folder of its script there, not the one it is called in.
        sys.path.append(os.getcwd())
    with name_errors(path, "cannot be imported"):
        module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ValueError(f"task={path!r} cannot be imported: {module.__file__} has no {attribute}")
    return getattr(module, attribute)
