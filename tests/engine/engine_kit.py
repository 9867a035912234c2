"""Tiny models with weights that make every part of the network count."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.request import Request, RequestOutput, SamplingParams
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tools import Tool

VOCAB = 300


@functools.cache
def has_compiler() -> bool:
    """Without one engines compute with torch, and tests of the kernels are skipped."""
    command = shlex.split(os.environ.get("CC") or "cc")
    try:
        return not subprocess.run([*command, "--version"], capture_output=True).returncode
    except OSError:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C compiler")

PRESETS = ("classic", "modern")


@functools.cache
def make_model(preset: str, **fields: Any) -> GPT:
    """Grouped heads, one short and one full window; not the zeros of a fresh initialisation."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 64,
    }
    shape |= {"sequence_len": 128, "window_pattern": "SL"}
    model = GPT(ModelConfig.preset(preset, **shape | fields))
    model.init_weights(torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=noise) * 0.15)
    return model


@torch.inference_mode()
def uncached_greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The definition: one full forward for each token, nothing kept."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def make_engine(
    model: GPT,
    tool: Tool | None = None,
    token_bytes: list[bytes] | None = None,
    **fields: Any,
) -> Engine:
    settings: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,
        "prefill_chunk": 8,
    } | fields
    return Engine(model, EngineConfig(**settings), tool, token_bytes)


def ask(id: str, prompt: list[int], output_token_ids: Iterable[int] = (), **params: Any) -> Request:
    fields = {
        name: params.pop(name) for name in ("priority", "client", "deadline") if name in params
    }
    return Request(
        id=id,
        prompt=prompt,
        output_token_ids=list(output_token_ids),
        params=SamplingParams(**{"temperature": 0.0, "max_tokens": 16} | params),
        **fields,
    )


def finish(
    engine: Engine, into: dict[str, list[RequestOutput]] | None = None
) -> dict[str, list[RequestOutput]]:
    """Steps until idle; outputs by request."""
    results = {} if into is None else into
    while engine.has_work:
        for output in engine.step():
            results.setdefault(output.request_id, []).append(output)
    engine.check_integrity()
    return results


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def answer(engine: Engine, request: Request) -> list[int]:
    engine.add(request)
    return tokens(finish(engine)[request.id])
