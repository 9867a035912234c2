"""A tiny run to serve, and a replica of it without Serve."""

from __future__ import annotations

from typing import Any

import httpx
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray.serve.replica import EngineReplica
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer

TOK = Tokenizer.bytes_only()
KEY = "test-key-of-the-deployment"


def write_checkpoint(root: Store, seed: int) -> None:
    config = ModelConfig.modern(
        vocab_size=TOK.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, sequence_len=1024
    )
    model = GPT(config)
    # Larger than a fresh model's, so that every token depends on all tokens before it.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(seed))
    checkpoint.save(
        root.child("runs", "tiny"),
        100 + seed,
        model_config=config,
        weights=model.state_dict(),
        optimizer=None,
        trainer={"step": 100 + seed},
        tokenizer=TOK,
    )


def engines(url: str) -> list[dict[str, Any]]:
    response = httpx.get(f"{url}/health", timeout=10)
    return response.json().get("engines", [])


class LocalReplica(EngineReplica):
    """Without Serve nothing awaits ``__del__``."""

    def __del__(self) -> None:  # type: ignore[override]
        pass
