"""nanochat's model and optimizer, from a checkout, for benchmarks beside ours."""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any


def load(checkout: str, dtype: str, compiles: bool = False) -> Any:
    """Its module ``nanochat.gpt``, computing in ``dtype``. Once a process: it reads that at import.

    Packages that only its other parts need are left empty. Nothing is compiled unless ``compiles``:
    on a CPU that took longer than it gave.
    """
    os.environ["NANOCHAT_DTYPE"] = dtype
    if not compiles:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path.insert(0, checkout)
    for name in ("wandb", "kernels", "filelock"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
    return importlib.import_module("nanochat.gpt")
