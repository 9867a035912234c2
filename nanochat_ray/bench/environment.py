"""What a comparison runs on: the machine, processes of its own, and text for its prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nanochat_ray.data import corpus, sources
from nanochat_ray.engine import kernels
from nanochat_ray.text.tokenizer import Tokenizer


def machine() -> str:
    """The processor, the cores of this process and its instruction sets that our kernels use."""
    name = kernels.processor().get("model name", "unknown processor")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores; instruction sets: {', '.join(kernels.available())}"


def own_process(program: str, child: Mapping[str, Any], launcher: Sequence[str] = ()) -> str:
    """The last line of ``nanochat-ray bench PROGRAM --child`` in a process of its own, with one
    thread.

    ``launcher`` are the arguments of Python before the program. RuntimeError if it fails."""
    argv = [sys.executable, *launcher, "-m", "nanochat_ray", "bench", program]
    process = subprocess.run(
        [*argv, "--child", json.dumps(child)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"{program} {child} failed:\n{process.stderr[-2000:]}")
    return process.stdout.strip().rpartition("\n")[2]


def text_tokens(text: Sequence[str], tokenizer: Tokenizer, limit: int = 1 << 20) -> list[int]:
    """Token ids of the documents of files, folders, globs or URIs, about ``limit`` at most."""
    ids: list[int] = []
    for unit in sources.units(sources.find(list(text))):
        for document in corpus.read(unit):
            ids += tokenizer.encode(document)
            if len(ids) >= limit:
                return ids
    return ids
