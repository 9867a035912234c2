"""Writes checkpoints for ``bench rolls``: sound ones, and ones that an endpoint must refuse."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from typing import Any

import torch
from torch import Tensor

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checkpoint.codec import write_tensors
from nanochat_ray.checkpoint.reader import FORMAT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer

NOISE = 0.1
"""Of the second set of weights, in standard deviations of each matrix."""
WORSE = 10.0
"""By which the metric of a worse checkpoint is larger."""
REASONS = {
    "incomplete": "manifest.json is missing",
    "byte": "weights.msgpack is damaged",
    "truncated": "weights.msgpack is damaged",
    "nan": "not finite",
    "worse": "is worse than",
    "tokenizer": "another tokenizer",
}
"""Kind of a bad checkpoint → what the reason of its refusal says."""


class _NotPublishedError(Exception):
    """Ends ``checkpoint.save`` before the manifest."""


class CheckpointWriter:
    """Continues a run with the weights of its latest checkpoint and the same with noise, in turns.

    Checkpoints have no optimizer state. ValueError for a run without a checkpoint.
    """

    def __init__(self, run: Store, seed: int = 0):
        self.run = run
        latest = checkpoint.load(run, optimizer=False)
        self.step, self.config, self.tokenizer = latest.step, latest.model_config, latest.tokenizer
        metric = checkpoint.val_metric(run, latest.name)
        self.metric = 1.0 if metric is None else metric
        generator = torch.Generator().manual_seed(seed)
        noisy = {name: _with_noise(t, generator) for name, t in latest.weights.items()}
        self._weights = [noisy, latest.weights]
        self._num_published = 0

    def publish(self) -> str:
        """Writes the next sound checkpoint; returns its name."""
        weights = self._weights[self._num_published % 2]
        self._num_published += 1
        self.step += 1
        return checkpoint.save(self.run, self.step, **self._fields(weights))

    def publish_bad(self, kind: str) -> str:
        """Writes a checkpoint that is bad in one way, of ``REASONS``, from the first moment in
        which it is complete; returns its name."""
        self.step += 1
        name = checkpoint.name_of(self.step)
        folder = self.run.child(name)
        weights = self._weights[0]
        tokenizer = _another(self.tokenizer) if kind == "tokenizer" else self.tokenizer

        def stop() -> None:
            raise _NotPublishedError

        fields = self._fields(weights, tokenizer)
        with contextlib.suppress(_NotPublishedError):
            checkpoint.save(self.run, self.step, check_publish=stop, **fields)
        if kind == "incomplete":
            return name
        data = folder.read_bytes("weights.msgpack")
        if kind == "nan":
            # ``checkpoint.save`` writes none, but another program may.
            name_of_first = next(iter(weights))
            bad = {**weights, name_of_first: torch.full_like(weights[name_of_first], torch.nan)}
            stream = io.BytesIO()
            write_tensors(stream, bad)
            folder.write_bytes("weights.msgpack", stream.getvalue())
        manifest = self._manifest(folder, self.metric + (WORSE if kind == "worse" else 0.0))
        if kind == "byte":
            middle = len(data) // 2
            flip = bytes([data[middle] ^ 1])
            folder.write_bytes("weights.msgpack", data[:middle] + flip + data[middle + 1 :])
        elif kind == "truncated":
            folder.write_bytes("weights.msgpack", data[:-1])
        folder.write_text("manifest.json", manifest)
        return name

    def prune(self, keep_latest_k: int) -> None:
        """As a run does that trains: the served checkpoints are leased."""
        checkpoint.prune(self.run, keep_latest_k)

    def delete(self, name: str) -> None:
        self.run.delete(f"{name}/manifest.json")
        self.run.delete(name)

    def _fields(
        self, weights: dict[str, Tensor], tokenizer: Tokenizer | None = None
    ) -> dict[str, Any]:
        return {
            "model_config": self.config,
            "weights": weights,
            "optimizer": None,
            "trainer": {"step": self.step},
            "tokenizer": tokenizer or self.tokenizer,
            "val_metric": self.metric,
        }

    def _manifest(self, folder: Store, metric: float) -> str:
        files = {}
        for file in folder.list():
            data = folder.read_bytes(file)
            files[file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        header = {"format": FORMAT, "step": self.step, "val_metric": metric}
        return json.dumps({**header, "files": files}, indent=1)


def _with_noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=generator)
    deviation = tensor.float().std()
    return (tensor.float() + NOISE * deviation * noise).to(tensor.dtype)


def _another(tokenizer: Tokenizer) -> Tokenizer:
    """As many tokens, but another split of text."""
    value = json.loads(tokenizer.to_json())
    return Tokenizer.from_json(json.dumps({**value, "pattern": r"\s+|\S+"}))
