"""Checkpoints of a run: written atomically, verified when they are read.

``runs/<run>/step-000100/`` holds config.json, weights.msgpack, optimizer.msgpack, trainer.json
and tokenizer.json, and last of all manifest.json with the size and SHA-256 of each. A folder
without a manifest is incomplete, so a crash at any moment leaves the complete checkpoints as they
are: the newest complete one is the run's latest. ``runs/<run>/latest`` names it too, for people and
scripts; no reader depends on it. Nothing in a checkpoint depends on the number of workers.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_ray import config as configs
from nanochat_ray.checkpoint.codec import write_tensors
from nanochat_ray.checkpoint.lease import leased_checkpoints
from nanochat_ray.checkpoint.names import is_complete as is_complete
from nanochat_ray.checkpoint.names import latest as latest
from nanochat_ray.checkpoint.names import name_of as name_of
from nanochat_ray.checkpoint.names import names as names
from nanochat_ray.checkpoint.names import step_of as step_of
from nanochat_ray.checkpoint.reader import (
    FORMAT,
    CheckpointReader,
    RunConfigFile,
    not_finite,
    parse_object,
    read_manifest,
)
from nanochat_ray.checks import short_repr
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import HashingFile, Store
from nanochat_ray.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    name: str
    step: int
    model_config: ModelConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor] | None
    trainer: dict[str, Any]
    tokenizer: Tokenizer


def save(
    run: Store,
    step: int,
    *,
    model_config: ModelConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor] | None,
    trainer: Mapping[str, Any],
    tokenizer: Tokenizer,
    val_metric: float | None = None,
    check_publish: Callable[[], None] = lambda: None,
) -> str:
    """Writes a checkpoint, publishes it, then moves ``latest``. Returns its name.

    ``val_metric`` is that of a validation of these weights, lower being better; see ``best``.
    ``check_publish`` is called when all files but the manifest are written; if it raises, the
    checkpoint stays incomplete. FloatingPointError, naming the tensor, before anything is written
    if one is not finite.
    """
    for file, tensors in (("weights", weights), ("optimizer state", optimizer or {})):
        if (bad := not_finite(tensors)) is not None:
            raise FloatingPointError(
                f"{file}: {bad} is not finite after step {step}: that checkpoint is not written, "
                "and the one before it is sound"
            )
    name = name_of(step)
    arrays = {"weights.msgpack": weights}
    if optimizer is not None:
        arrays["optimizer.msgpack"] = optimizer
    model = {"model": configs.to_json(model_config), "tokenizer": tokenizer.fingerprint}
    texts = {
        "config.json": json.dumps(model, indent=1),
        "trainer.json": json.dumps(dict(trainer), indent=1),
        "tokenizer.json": tokenizer.to_json(),
    }
    metric = val_metric if val_metric is not None and math.isfinite(val_metric) else None
    header = {"format": FORMAT, "step": step, "val_metric": metric}
    _write(run.child(name), arrays, texts, header, check_publish)
    run.write_text("latest", name)
    return name


def _write(
    folder: Store,
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    header: Mapping[str, Any],
    check_publish: Callable[[], None],
) -> None:
    """The files of a checkpoint, and last its manifest."""
    # If an earlier attempt wrote this checkpoint, it is incomplete from here on.
    folder.delete("manifest.json")
    files: dict[str, dict[str, Any]] = {}

    def add(file: str, stream: HashingFile) -> None:
        files[file] = {"size": stream.size, "sha256": stream.sha256.hexdigest()}

    for file, values in tensors.items():
        with folder.writing(file) as out:
            stream = HashingFile(out)
            write_tensors(stream, values)
        add(file, stream)
    for file, text in texts.items():
        folder.write_text(file, text)
        stream = HashingFile(io.BytesIO(text.encode()))
        stream.read()
        add(file, stream)
    check_publish()
    folder.write_text("manifest.json", json.dumps({**header, "files": files}, indent=1))


def resume_warnings(run: Store) -> list[str]:
    """One line for each folder or file that disagrees with ``latest``: newer but incomplete."""
    newest = latest(run)
    lines = []
    for name in names(run):
        if name == newest:
            break
        lines.append(f"{name} is incomplete (it has no manifest.json): skipped")
    pointer = ""
    with contextlib.suppress(OSError):
        pointer = run.read_bytes("latest").decode(errors="replace").strip()
    if newest is not None and pointer != newest:
        state = f"names {short_repr(pointer)}" if pointer else "is missing or empty"
        lines.append(f"the file latest {state}; the newest complete checkpoint is {newest}")
    return lines


def _reader(run: Store, name: str | None) -> CheckpointReader:
    """Of a checkpoint, by default the latest. ValueError if there is none."""
    if not name:
        name = latest(run)
        if name is None:
            raise ValueError(f"run {run.uri} has no complete checkpoint")
        for line in resume_warnings(run):
            _LOG.warning("run %s: %s", run.uri, line)
    return CheckpointReader(run.child(name), step_of(name))


def load_config(run: Store, name: str | None = None) -> RunConfigFile:
    return _reader(run, name).config()


def load_trainer(run: Store, name: str | None = None) -> dict[str, Any]:
    return _reader(run, name).trainer()


def load_tokenizer(run: Store, name: str | None = None) -> Tokenizer:
    reader = _reader(run, name)
    return reader.tokenizer(reader.config())


def weights_digest(run: Store, name: str) -> str:
    """SHA-256 (hex) of a checkpoint's weights, as its manifest has it."""
    folder = run.child(name)
    files = read_manifest(folder, step_of(name))
    if "weights.msgpack" not in files:
        raise ValueError(f"checkpoint {folder.uri}: weights.msgpack is missing")
    return str(files["weights.msgpack"]["sha256"])


def weight_version(run: Store, name: str) -> str:
    """Identifies the weights of a checkpoint: its name and the first 8 digits of their SHA-256.

    A run that resumes with another number of workers may write other weights under a name. Raises
    ValueError as ``weights_digest``.
    """
    return f"{name}-{weights_digest(run, name)[:8]}"


def load(run: Store, name: str | None = None, *, optimizer: bool) -> Checkpoint:
    """A verified checkpoint, by default the latest, and the optimizer's state on request.

    Raises ValueError, naming the file, if one is missing or damaged, if the tokenizer is not
    the one that belongs to the weights, or if a tensor is not finite.
    """
    reader = _reader(run, name)
    config = reader.config()
    return Checkpoint(
        name=name_of(reader.step),
        step=reader.step,
        model_config=config.model,
        weights=reader.tensors("weights.msgpack"),
        optimizer=reader.tensors("optimizer.msgpack") if optimizer else None,
        trainer=reader.trainer(),
        tokenizer=reader.tokenizer(config),
    )


def load_model(
    run: Store,
    name: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[GPT, Tokenizer]:
    """A model ready for inference, its weights in ``dtype``, and its tokenizer.

    Raises ValueError as ``load`` does.
    """
    reader = _reader(run, name)
    config = reader.config()
    tokenizer = reader.tokenizer(config)
    model = reader.model(config.model, dtype)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), tokenizer


def _val_metrics(run: Store, names: Iterable[str]) -> dict[str, float]:
    """The validation metric of each complete checkpoint that has one.

    A damaged manifest gives none: it is refused by name when its checkpoint is loaded.
    """
    metrics = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            manifest = parse_object(name, run.read_bytes(f"{name}/manifest.json"))
            metric = manifest.get("val_metric", manifest.get("score"))  # its name until 2026
            if isinstance(metric, int | float) and math.isfinite(metric):
                metrics[name] = float(metric)
    return metrics


def val_metrics(run: Store) -> dict[str, float]:
    """The validation metric, lower being better, of each complete checkpoint that has one."""
    return _val_metrics(run, names(run))


def val_metric(run: Store, name: str) -> float | None:
    """That of one checkpoint."""
    return _val_metrics(run, [name]).get(name)


def best(run: Store) -> str | None:
    """Name of the checkpoint with the lowest validation metric; None without a validation."""
    metrics = val_metrics(run)
    return min(metrics, key=metrics.__getitem__) if metrics else None


def resolve(run: Store, name: str = "") -> str:
    """The checkpoint that a user names: "" is the latest, "best" that with the best validation.

    Raises ValueError that lists the complete ones.
    """
    match = latest(run) if not name else best(run) if name == "best" else name
    if match is not None and run.exists(match):  # whether it is complete shows when it is loaded
        return match
    complete = [n for n in names(run) if is_complete(run, n)]
    if not complete:
        raise ValueError(f"run {run.uri} has no checkpoint")
    if name == "best":
        raise ValueError(f"checkpoint='best' is not in run {run.uri}: no validation was kept")
    raise ValueError(f"checkpoint={match!r} is not in run {run.uri}: it has {', '.join(complete)}")


def prune(run: Store, keep_latest_k: int, *, keep_best: bool = False) -> None:
    """Deletes all but the ``keep_latest_k`` newest checkpoints, and incomplete ones before them.

    The latest stays in any case, so does anything newer or leased (``lease``), and with
    ``keep_best`` the one with the best validation.
    """
    newest = latest(run)
    if newest is None:
        return
    older = [n for n in names(run) if step_of(n) < step_of(newest)]
    complete = [n for n in older if is_complete(run, n)]
    keep = set(complete[: keep_latest_k - 1]) | leased_checkpoints(run)
    if keep_best:
        metrics = _val_metrics(run, [newest, *complete])
        keep |= {min(metrics, key=metrics.__getitem__)} if metrics else set()
    for name in older:
        if name not in keep:
            # The manifest goes first: from then on the checkpoint is incomplete.
            run.delete(f"{name}/manifest.json")
            run.delete(name)
