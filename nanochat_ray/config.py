"""Configurations to and from JSON.

Each room holds its own configuration, a frozen dataclass that is checked when it is constructed
(``model/config.py``, ``optim/config.py``, ``train/config.py``, ``engine/config.py``).
Configurations are composed, never inherited, and never mutated: to vary one, call
``dataclasses.replace``. Checkpoints store them as ``to_json`` writes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from nanochat_ray.checks import require, short_repr

T = TypeVar("T")


def require_finite(config: Any) -> None:
    """ValueError, naming the field, if a float of ``config`` is NaN or infinite."""
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        require(not isinstance(value, float) or math.isfinite(value), name, value, "a number")


RENAMED_FIELDS: dict[str, dict[str, str]] = {
    "TrainConfig": {
        "batch_rows": "global_batch_size",
        "micro_rows": "micro_batch_size",
        "eval_rows": "eval_sequences",
        "keep": "keep_latest_k",
    },
    "OptimConfig": {
        "warmup": "warmup_ratio",
        "warmdown": "warmdown_ratio",
        "final_lr": "final_lr_frac",
        "equilibrate": "row_normalize",
    },
    "EngineConfig": {
        "max_slots": "max_num_seqs",
        "max_len": "max_model_len",
        "token_budget": "max_num_batched_tokens",
        "prefix_tokens": "prefix_cache_tokens",
        "kv_memory": "kv_cache_memory_fraction",
        "max_waiting": "max_queue_size",
        "overlap": "async_scheduling",
        "speculative_tokens": "num_speculative_tokens",
        "speculative_rows": "speculative_disable_by_batch_size",
        "speculative_ngram": "prompt_lookup_max",
    },
    "ServeConfig": {
        "engines": "num_replicas",
        "max_engines": "max_replicas",
        "ingresses": "num_ingress_replicas",
        "snapshot": "checkpoint",
    },
    "train": {"ratio": "tokens_per_param"},
    "eval": {"slots": "max_num_seqs"},
    "export": {"take": "import_from"},
}
"""Old name of a field → its name, by configuration. Checkpoints that were written with old names
still load; a flag with an old name fails and names the new one."""


NULL_FIELDS: dict[str, tuple[str, ...]] = {"ModelConfig": ("norm_eps",)}
"""Fields that older checkpoints may store as null, which is read as the default."""


def with_new_names(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of the configuration class ``kind``, with each old field name replaced."""
    table = RENAMED_FIELDS.get(kind, {})
    return {table.get(name, name): value for name, value in values.items()}


def new_name(name: str) -> str | None:
    """The new name of a flag or field, given with ``-`` or ``_``; None if it has not changed."""
    key = name.strip("-").replace("-", "_")
    return next((table[key] for table in RENAMED_FIELDS.values() if key in table), None)


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; nested configurations become nested objects."""
    return dataclasses.asdict(config)


def _check_type(kind: Any, name: str, value: Any) -> Any:
    """``value`` as a field of type ``kind`` may hold it; whole floats' ints become floats.

    ValueError names the field. Types that are none of JSON's are left to the dataclass.
    """
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        require(value in choices, name, value, f"one of {choices}")
    elif get_origin(kind) is UnionType or kind in (bool, int, float, str):
        kinds = choices or (kind,)
        if float in kinds and type(value) is int and abs(value) < 1 << 53:
            return float(value)
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        require(type(value) in kinds, name, value, names)
        sound = math.isfinite(value) if type(value) is float else True
        sound = abs(value) < 1 << 63 if type(value) is int else sound
        require(sound, name, value, "a finite number of at most 64 bits")
    return value


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that ``to_json`` wrote.

    ValueError names a missing or unknown field, or one of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__} is {short_repr(values)}, not an object")
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = with_new_names(kind.__name__, values)
    nullable_fields = NULL_FIELDS.get(kind.__name__, ())
    values = {n: v for n, v in values.items() if not (v is None and n in nullable_fields)}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no field {short_repr(unknown[0])}; it has {sorted(fields)}"
        )
    types = get_type_hints(kind)
    arguments = {
        name: from_json(types[name], value)
        if dataclasses.is_dataclass(types[name])
        else _check_type(types[name], name, value)
        for name, value in values.items()
    }
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from None
