"""How many kernels a decode launches for each layer, counted without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from nanochat_ray.engine import model as inference
from nanochat_ray.engine import triton_attention, triton_fused, triton_matmul, triton_operators
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.kvcache import paged_cache
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.memory import make_allocator
from nanochat_ray.engine.kvcache.paged_cache import PagedCache
from nanochat_ray.engine.model import InferenceModel
from tests.engine.engine_kit import make_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DECODES = [Span(0, 3, 1, True), Span(1, 5, 1, True)]
WITH_PROMPT = [DECODES[0], Span(1, 0, 4, False)]


class Kernels(TorchDispatchMode):
    """Counts Triton's launches, and torch's operations that are neither views nor allocations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.names: list[str] = []
        for module in (triton_attention, triton_fused, triton_matmul, triton_operators):
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                monkeypatch.setattr(module, name, self._counting(name))

    def _counting(self, name: str) -> Any:
        names = self.names

        class Counting:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                names.append(name)
                return lambda *args, **rest: None

        return Counting()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        allocates = func._schema.name.startswith(("aten::empty", "aten::new_empty"))
        if not func.is_view and not allocates and "_unsafe_view" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def kernels(
    depth: int, spans: list[Span], monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> list[str]:
    model = make_model("modern", n_layer=depth, **fields)
    config = model.config
    engine = InferenceModel(config, model.state_dict(), dtype=torch.float32, device=DEVICE)
    blocks = make_allocator(config, EngineConfig(max_num_seqs=2), 64, torch.float32, 1 << 30)
    cache = PagedCache(config, blocks, 2, 64, torch.float32, DEVICE)
    size = cache.prepare(spans)
    ids = torch.zeros(size, dtype=torch.int64, device=DEVICE)
    with monkeypatch.context() as patch, torch.inference_mode(), Kernels(patch) as counter:
        engine.hidden(ids, ids, cache)
    return counter.names


@pytest.mark.parametrize(
    ("spans", "fields", "count"),
    [
        (DECODES, {}, 10),
        (DECODES, {"attention_gate": True}, 13),
        (WITH_PROMPT, {}, 11),  # both kinds of attention
        (WITH_PROMPT[1:], {}, 9),  # no merge
    ],
)
def test_kernels_of_a_layer(
    spans: list[Span], fields: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (inference, paged_cache):
        monkeypatch.setattr(module, "use_triton", lambda device: True)
    shallow, deep = (kernels(depth, spans, monkeypatch, **fields) for depth in (2, 6))
    assert len(deep) - len(shallow) == 4 * count, deep
