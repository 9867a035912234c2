"""What a comparison ran on: the machine, and text for its prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence

from nanochat_ray.data import corpus, sources
from nanochat_ray.engine import kernels
from nanochat_ray.text.tokenizer import Tokenizer


def machine() -> str:
    """The processor, the cores of this process and its instruction sets that our kernels use."""
    name = kernels.processor().get("model name", "unknown processor")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores; instruction sets: {', '.join(kernels.available())}"


def text_tokens(text: Sequence[str], tokenizer: Tokenizer, limit: int = 1 << 20) -> list[int]:
    """Token ids of the documents of files, folders, globs or URIs, about ``limit`` at most."""
    ids: list[int] = []
    for unit in sources.units(sources.find(list(text))):
        for document in corpus.read(unit):
            ids += tokenizer.encode(document)
            if len(ids) >= limit:
                return ids
    return ids
