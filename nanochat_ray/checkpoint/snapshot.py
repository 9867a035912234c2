"""Snapshots of a run: saved whole or not at all, verified when they are read.

``runs/<run>/step-000100/`` holds config.json, weights.msgpack, optimizer.msgpack, trainer.json
and tokenizer.json, and last of all manifest.json with the size and SHA-256 of each. A folder
without a manifest is not a snapshot. ``runs/<run>/latest`` names the newest one and moves after
it is whole, so a crash at any moment leaves the last whole snapshot in place. Nothing in it
depends on the number of workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_ray import config as configs
from nanochat_ray.checkpoint.codec import read_tensors, write_tensors
from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer


class _Hashed:
    """A stream that counts and hashes what passes through it, in either direction."""

    def __init__(self, stream: Any):
        self.stream, self.sha256, self.size = stream, hashlib.sha256(), 0

    def _pass(self, data: Any) -> Any:
        self.sha256.update(data)
        self.size += len(data)
        return data

    def write(self, data: Any) -> None:
        self.stream.write(self._pass(data))

    def read(self, size: int = -1) -> bytes:
        return self._pass(self.stream.read(None if size < 0 else size))


@dataclass(frozen=True)
class RunConfigFile:
    """config.json: the model, and the fingerprint of the tokenizer it was trained with."""

    model: ModelConfig
    tokenizer: str


@dataclass(frozen=True)
class Snapshot:
    name: str
    step: int
    model_config: ModelConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor] | None
    trainer: dict[str, Any]
    tokenizer: Tokenizer


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def save(
    run: Store,
    step: int,
    *,
    model_config: ModelConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor] | None,
    trainer: Mapping[str, Any],
    tokenizer: Tokenizer,
    score: float | None = None,
) -> str:
    """Writes a snapshot, publishes it, then moves ``latest``. Returns its name.

    ``score`` is what a validation of these weights gave, lower being better; see ``best``.
    """
    name = name_of(step)
    folder = run.child(name)
    # What an earlier attempt left there is no snapshot any more from here on.
    folder.delete("manifest.json")
    files: dict[str, dict[str, Any]] = {}

    def note(file: str, stream: _Hashed) -> None:
        files[file] = {"size": stream.size, "sha256": stream.sha256.hexdigest()}

    tensors = {"weights.msgpack": weights}
    if optimizer is not None:
        tensors["optimizer.msgpack"] = optimizer
    for file, values in tensors.items():
        with folder.writing(file) as out:
            stream = _Hashed(out)
            write_tensors(stream, values)
        note(file, stream)
    model = {"model": configs.to_json(model_config), "tokenizer": tokenizer.fingerprint}
    texts = {
        "config.json": json.dumps(model, indent=1),
        "trainer.json": json.dumps(dict(trainer), indent=1),
        "tokenizer.json": tokenizer.to_json(),
    }
    for file, text in texts.items():
        folder.write_text(file, text)
        stream = _Hashed(io.BytesIO(text.encode()))
        stream.read()
        note(file, stream)
    manifest = {
        "format": "nanochat_ray snapshot 1",
        "step": step,
        "score": score if score is not None and math.isfinite(score) else None,
        "files": files,
    }
    folder.write_text("manifest.json", json.dumps(manifest, indent=1))
    run.write_text("latest", name)
    return name


def latest(run: Store) -> str | None:
    """Name of the newest whole snapshot, or None if there is none."""
    return run.read_text("latest").strip() if run.exists("latest") else None


def _manifest(run: Store, name: str) -> dict[str, Any]:
    folder = run.child(name)
    if not folder.exists("manifest.json"):
        raise ValueError(f"checkpoint {folder.uri} is not whole: manifest.json is missing")
    try:
        return json.loads(folder.read_text("manifest.json"))["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {folder.uri}: manifest.json is damaged ({error})") from None


def _find(run: Store, name: str | None) -> str:
    found = name or latest(run)
    if found is None:
        raise ValueError(f"run {run.uri} has no checkpoint")
    return found


class _Reader:
    """The files of one snapshot, each checked against the manifest."""

    def __init__(self, run: Store, name: str):
        self.folder, self.files = run.child(name), _manifest(run, name)

    def _check(self, file: str, found: dict[str, Any]) -> None:
        if found != self.files[file]:
            raise ValueError(
                f"checkpoint {self.folder.uri}: {file} is damaged ({found['size']} bytes, SHA-256 "
                f"{found['sha256'][:16]}…; the manifest says {self.files[file]['size']}, "
                f"{self.files[file]['sha256'][:16]}…)"
            )

    def _open(self, file: str) -> Any:
        if file not in self.files or not self.folder.exists(file):
            raise ValueError(f"checkpoint {self.folder.uri}: {file} is missing")
        return self.folder.open_input(file)

    def text(self, file: str) -> str:
        with self._open(file) as source:
            stream = _Hashed(source)
            data = stream.read()
        self._check(file, {"size": stream.size, "sha256": stream.sha256.hexdigest()})
        return data.decode()

    def tensors(self, file: str) -> dict[str, Tensor]:
        with self._open(file) as source:
            stream = _Hashed(source)
            try:
                tensors = read_tensors(stream, self.files[file]["size"])
                damage = None
            except ValueError as error:
                tensors, damage = {}, error
            while stream.read(1 << 20):
                pass
        self._check(file, {"size": stream.size, "sha256": stream.sha256.hexdigest()})
        if damage is not None:
            raise ValueError(f"checkpoint {self.folder.uri}: {file}: {damage}")
        return tensors

    def config(self) -> RunConfigFile:
        found = json.loads(self.text("config.json"))
        return RunConfigFile(configs.from_json(ModelConfig, found["model"]), found["tokenizer"])

    def tokenizer(self, expected: str) -> Tokenizer:
        tokenizer = Tokenizer.from_json(self.text("tokenizer.json"))
        if tokenizer.fingerprint != expected:
            raise ValueError(
                f"checkpoint {self.folder.uri}: tokenizer.json ({tokenizer.fingerprint[:16]}…) is "
                f"not the one that the weights were trained with ({expected[:16]}…)"
            )
        return tokenizer


def load_config(run: Store, name: str | None = None) -> RunConfigFile:
    return _Reader(run, _find(run, name)).config()


def load_trainer(run: Store, name: str | None = None) -> dict[str, Any]:
    return json.loads(_Reader(run, _find(run, name)).text("trainer.json"))


def load(run: Store, name: str | None = None, *, optimizer: bool) -> Snapshot:
    """A verified snapshot, by default the latest, with the optimizer's state if asked for.

    Raises ValueError, naming the file, if one is missing or damaged or if the tokenizer is not
    the one that belongs to the weights.
    """
    name = _find(run, name)
    reader = _Reader(run, name)
    config = reader.config()
    return Snapshot(
        name=name,
        step=step_of(name),
        model_config=config.model,
        weights=reader.tensors("weights.msgpack"),
        optimizer=reader.tensors("optimizer.msgpack") if optimizer else None,
        trainer=json.loads(reader.text("trainer.json")),
        tokenizer=reader.tokenizer(config.tokenizer),
    )


def load_model(
    run: Store,
    name: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[GPT, Tokenizer]:
    """A model ready for inference, its weights in ``dtype``, and its tokenizer."""
    reader = _Reader(run, _find(run, name))
    config = reader.config()
    tokenizer = reader.tokenizer(config.tokenizer)
    model = GPT(config.model, compute_dtype=dtype)
    try:
        model.load_state_dict(reader.tensors("weights.msgpack"))
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint {run.uri}: the weights do not fit config.json: {error}"
        ) from None
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), tokenizer


def _scores(run: Store, names: Iterable[str]) -> dict[str, float]:
    """Those of the whole snapshots that were validated, with what they were given."""
    found = {}
    for name in names:
        if run.exists(f"{name}/manifest.json"):
            score = json.loads(run.read_text(f"{name}/manifest.json")).get("score")
            if score is not None:
                found[name] = float(score)
    return found


def _names(run: Store) -> list[str]:
    """Folders of snapshots, whole or not, the newest first."""
    return sorted((n for n in run.list() if n.startswith("step-")), key=step_of, reverse=True)


def best(run: Store) -> str | None:
    """Name of the snapshot with the best validation, of equals the newest; None if none has one."""
    found = _scores(run, _names(run))
    return min(found, key=found.__getitem__) if found else None


def prune(run: Store, keep: int, *, keep_best: bool = False) -> None:
    """Removes all but the ``keep`` newest snapshots, and what never became one.

    The one that ``latest`` names stays in any case, so does anything newer, and with
    ``keep_best`` the one with the best validation.
    """
    current = latest(run)
    if current is None:
        return
    names = _names(run)
    older = [n for n in names if step_of(n) < step_of(current)]
    whole = [n for n in older if run.child(n).exists("manifest.json")]
    kept = set(whole[: keep - 1])
    if keep_best:
        scores = _scores(run, [current, *whole])
        kept |= {min(scores, key=scores.__getitem__)} if scores else set()
    for name in older:
        if name not in kept:
            # The manifest goes first: from then on it is no snapshot, whatever is left of it.
            run.delete(f"{name}/manifest.json")
            run.delete(name)
