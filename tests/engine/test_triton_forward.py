"""The fused forward computes what the model's operators compute one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from nanochat_ray.engine import model as inference
from nanochat_ray.engine import triton_forward
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.kvcache import paged_cache
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.memory import make_allocator
from nanochat_ray.engine.kvcache.paged_cache import PagedCache
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.model.config import COMMON_OPTIONS
from nanochat_ray.model.gpt import GPT
from tests.engine.engine_kit import VOCAB, make_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = [
    [Span(0, 0, 2, False), Span(1, 14, 3, False)],
    [Span(0, 2, 1, True), Span(1, 17, 1, True)],
]
"""Prompts, of which one crosses a block (behind keys of zeros); decodes."""


def forward(
    model: GPT, dtype: torch.dtype, device: torch.device, is_fused: bool
) -> tuple[list[Tensor], Tensor]:
    """Hidden states of ``STEPS``, and all pages of the cache."""
    config = model.config
    engine = InferenceModel(config, model.state_dict(), dtype=dtype, device=device)
    assert (engine._triton_forward is not None) == is_fused
    settings = EngineConfig(max_num_seqs=4)
    blocks = make_allocator(config, settings, 64, dtype, 1 << 30)
    cache = PagedCache(config, blocks, 4, 64, dtype, device)
    for slot in range(2):
        tables = blocks.empty_tables()
        assert blocks.extend(tables, 0, 32)
        cache.set_block_tables(slot, tables)
    generator, results = torch.Generator().manual_seed(0), []
    for spans in STEPS:
        size = cache.prepare(spans)
        ids = torch.randint(VOCAB, (2, size), generator=generator)
        ids[0, 1] = 7  # starts a document, where the model knows that
        ids[1, 0] = -1
        with torch.inference_mode():
            results.append(engine.hidden(*ids.to(device), cache).cpu())
    pages = [torch.cat((k.flatten(), v.flatten())) for _, k, v in cache._pages]
    return results, torch.cat(pages).cpu()


@pytest.mark.parametrize("has_skips", [False, True])
def test_an_option_that_it_lacks_is_the_operators(
    has_skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "use_triton", lambda device: True)
    monkeypatch.setattr(triton_forward, "OPTIONS", COMMON_OPTIONS - {"skips"})
    model = make_model("modern", skips=has_skips)
    engine = InferenceModel(model.config, model.state_dict())
    assert (engine._triton_forward is None) == has_skips


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        ("classic", {}),
        ("modern", {}),
        ("modern", {"n_layer": 1}),
        ("modern", {"n_layer": 5, "skips": True, "attention_gate": True}),
        ("modern", {"n_layer": 4, "skips": True, "document_start": 7, "n_embd": 48}),
        ("modern", {"n_layer": 3, "n_kv_head": 2, "rope_factor": 2.0}),
    ],
)
def test_fused_forward_equals_the_operators(
    preset: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(preset, **{"n_embd": 32, "n_head": 2, "n_kv_head": 1} | fields)
    exact, exact_pages = forward(model, torch.float64, torch.device("cpu"), False)
    for module in (inference, paged_cache):
        monkeypatch.setattr(module, "use_triton", lambda device: True)
    results, pages = forward(model, torch.float32, DEVICE, True)
    # Roundings accumulate over the layers' sums of n_embd products.
    bound = 2.0**-24 * model.config.n_layer * model.config.n_embd * 8
    for result, reference in zip(results, exact, strict=True):
        error = (result.double() - reference).norm() / reference.norm()
        assert float(error) < bound
    assert float((pages.double() - exact_pages).norm() / exact_pages.norm()) < bound
