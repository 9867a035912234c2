"""A tiny run to serve, and a replica of it without Serve."""

from __future__ import annotations

from typing import Any

import httpx
import torch

from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray.serve.replica import EngineReplica
from nanochat_ray.storage import Store
from tests.tiny import save_model, tiny_config

KEY = "test-key-of-the-deployment"


def write_checkpoint(root: Store, seed: int, **fields: int) -> None:
    """``fields``: of the model's configuration."""
    model = GPT(tiny_config(n_head=2, n_kv_head=1, sequence_len=1024, **fields))
    # Larger than a fresh model's, so that every token depends on all tokens before it.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(seed))
    save_model(root.child("runs", "tiny"), 100 + seed, model)


def engines(url: str) -> list[dict[str, Any]]:
    """Those that an ingress names; none if no ingress answers."""
    try:
        response = httpx.get(f"{url}/health", timeout=10)
    except httpx.TransportError:
        return []
    return response.json()["engines"] if response.status_code == 200 else []


class LocalReplica(EngineReplica):
    """Without Serve nothing awaits ``__del__``."""

    def __del__(self) -> None:  # type: ignore[override]
        pass
