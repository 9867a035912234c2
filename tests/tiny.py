"""Small real things that the tests share: a model's shape, a dataset, ports, patience."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import numpy as np
import pytest

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.data.shards import Manifest, write_shard
from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes_only()


def tiny_config(preset: str = "modern", **fields: Any) -> ModelConfig:
    """2 layers, 32 wide, 4 heads over 2, for the byte tokenizer."""
    shape = {
        "vocab_size": TOKENIZER.vocab_size,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
        "sequence_len": 32,
    }
    return ModelConfig.preset(preset, **{**shape, **fields})


def write_dataset(
    root: Store, name: str, kind: str = "base", *, rows: int = 50, length: int = 32, seed: int = 0
) -> Manifest:
    """A dataset of random rows for the byte tokenizer, with its tokenizer, under ``root``."""
    rng = np.random.default_rng(seed)
    store = root.child("datasets", name)
    splits = {}
    for split, count in (("train", rows), ("val", 8)):
        # Skewed, so that there is something to learn; but every byte comes, or gradients would
        # have a low rank, whose rounding noise Muon would blow up to full size.
        ids = rng.integers(0, 256, (2, count, length + 1)).min(axis=0)
        ids = ids.astype(np.uint16)
        ids[:, 0] = TOKENIZER.bos
        mask = (rng.random(ids.shape) < 0.4).astype(np.uint8) if kind == "sft" else None
        cut = count // 2
        halves = [slice(0, cut), slice(cut, count)]
        splits[split] = [
            write_shard(store, f"{split}-{i}.arrow", ids[h], mask[h] if mask is not None else None)
            for i, h in enumerate(halves)
        ]
    manifest = Manifest(
        kind="sft" if kind == "sft" else "base",
        tokenizer=TOKENIZER.fingerprint,
        sequence_len=length,
        dtype="uint16",
        splits=splits,
        key="test",
        about={"tokens": rows * length, "documents": rows, "share_kept": 1.0},
    )
    TOKENIZER.save(root.child("tokenizers", TOKENIZER.fingerprint[:16]))
    store.write_text("manifest.json", manifest.to_json())
    return manifest


def save_model(
    run: Store,
    step: int,
    model: GPT,
    *,
    tokenizer: Tokenizer = TOKENIZER,
    val_metric: float | None = None,
    **trainer: Any,
) -> str:
    """A checkpoint of the run without an optimizer; ``trainer`` adds to the trainer's state."""
    return checkpoint.save(
        run,
        step,
        model_config=model.config,
        weights=model.state_dict(),
        optimizer=None,
        trainer={"step": step, **trainer},
        tokenizer=tokenizer,
        val_metric=val_metric,
    )


def hold_up_grammars(
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[threading.Event, threading.Event]:
    """Grammars take long to compile: set once one is begun, and to be set for them to go on."""
    compiling, may_go_on = threading.Event(), threading.Event()
    compile_it = Grammars._compile

    def slowly(grammars: Grammars, text: str) -> Any:
        compiling.set()
        assert may_go_on.wait(60)
        return compile_it(grammars, text)

    monkeypatch.setattr(Grammars, "_compile", slowly)
    return compiling, may_go_on


def free_ports(count: int) -> list[int]:
    """Ports that are free on every interface, as is port + 10000 (weed opens both).

    Those of tests that run at the same time are from ranges of their own. Beside a Ray there is one
    process, whose ports + 10000 are above those of Serve (``on_ray.ports.LAST``), which may have
    been chosen and not be in use yet, and below outgoing connections."""
    ports: list[int] = []
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    port = 22_000 + worker % 4 * 2000 + os.getpid() % 700
    while len(ports) < count:
        port += 1
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("", port))
                two.bind(("", port + 10000))
            except OSError:
                continue
        ports.append(port)
    return ports
