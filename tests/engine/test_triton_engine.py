"""A whole engine on the Triton kernels, in the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from nanochat_ray.engine import model as inference
from nanochat_ray.engine import sampling_state
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kvcache import paged_cache
from nanochat_ray.engine.triton_operators import TritonOperators
from tests.engine.engine_kit import PRESETS, ask, finish, make_model, tokens


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_engine_on_triton_gives_the_tokens_of_torch(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(preset, n_layer=2, sequence_len=64)

    def completions(device: str) -> tuple[Engine, list[list[int]]]:
        config = EngineConfig(
            max_num_seqs=4,
            max_num_batched_tokens=24,
            prefill_chunk=8,
            kv_layout="paged",
            kernels="torch",
            precision="fp32",
            max_model_len=48,
            prefix_cache_tokens=64,
        )
        engine = Engine(model, config, device=device)
        for i, params in enumerate(({"temperature": 0.0}, {"seed": 5, "top_p": 0.9, "top_k": 40})):
            engine.add(ask(f"r{i}", list(range(3, 3 + 11 * (i + 1))), max_tokens=6, **params))
        outputs = finish(engine)
        return engine, [tokens(outputs[f"r{i}"]) for i in range(2)]

    _, reference = completions("cpu")
    for module in (paged_cache, inference, sampling_state):
        monkeypatch.setattr(module, "use_triton", lambda device: True)
    engine, results = completions("cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(engine.runner.model._ops, TritonOperators)
    assert results == reference
