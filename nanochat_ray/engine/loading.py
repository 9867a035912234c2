"""An engine from a checkpoint of a run."""

from __future__ import annotations

import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.precision import checkpoint_dtype
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer


def engine_from_run(
    run: Store,
    config: EngineConfig,
    checkpoint_name: str = "",
    device: str | torch.device = "cpu",
    tokenizer_fingerprint: str = "",
) -> tuple[Engine, Tokenizer]:
    """An engine for a checkpoint of a run, the latest by default, and its tokenizer.

    ValueError if there is no such checkpoint, or if ``tokenizer_fingerprint`` is set and is not
    that of its tokenizer. Threads that torch starts here end with the calling thread: see
    ``machine.run_in_temporary_thread``.
    """
    name = checkpoint.resolve(run, checkpoint_name)
    dtype = checkpoint_dtype(config.precision)
    # To the CPU: the memory of a GPU is for the engine's copy of the weights and its KV cache.
    model, tokenizer = checkpoint.load_model(run, name, dtype=dtype)
    if tokenizer_fingerprint not in ("", tokenizer.fingerprint):
        raise ValueError(f"checkpoint={name!r} has another tokenizer than the one in use")
    engine = Engine.from_model(model, tokenizer, config, device)
    engine.weight_version = checkpoint.weight_version(run, name)
    return engine, tokenizer
