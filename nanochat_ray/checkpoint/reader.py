"""Reading a checkpoint: every file is verified against the manifest, and every value checked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_ray import config as configs
from nanochat_ray.checkpoint.codec import read_tensors
from nanochat_ray.checks import short_repr
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.retry import is_outage
from nanochat_ray.storage import HashingFile, Store
from nanochat_ray.text.tokenizer import Tokenizer

FORMAT = "nanochat_ray snapshot 1"
"""A name on disk, of a time when a checkpoint was called a snapshot: it stays."""


@dataclass(frozen=True)
class RunConfigFile:
    """config.json: the model, and the fingerprint of the tokenizer it was trained with."""

    model: ModelConfig
    tokenizer: str


def parse_object(where: str, data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``. ValueError, naming ``where``, for anything else."""
    try:
        value = json.loads(data.decode())
    except RecursionError:
        raise ValueError(f"{where} is damaged: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged: it is {short_repr(value)}, not an object")
    return value


def read_manifest(folder: Store, step: int) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of the checkpoint of ``step`` in ``folder``.

    ValueError if its manifest is missing or damaged; OSError while storage is away.
    """
    where = f"checkpoint {folder.uri}: manifest.json"
    try:
        data = folder.read_bytes("manifest.json")
    except OSError as error:
        if is_outage(error):
            raise
        raise ValueError(f"{where} is missing: it is incomplete") from None
    manifest = parse_object(where, data)
    if manifest.get("format") != FORMAT:
        text = short_repr(manifest.get("format"))
        raise ValueError(f"{where} is damaged: format={text}")
    if manifest.get("step") != step:
        text = short_repr(manifest.get("step"))
        raise ValueError(f"{where} is of step {text}, not {step}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise ValueError(f"{where} is damaged: files={short_repr(files)}")
    return files


def _is_entry(value: Any) -> bool:
    """Whether a manifest's entry of a file has a size and a SHA-256."""
    has_size = isinstance(value, dict) and type(value.get("size")) is int
    return has_size and isinstance(value.get("sha256"), str)


class CheckpointReader:
    """The files of one checkpoint, each checked against the manifest."""

    def __init__(self, folder: Store, step: int):
        self.folder, self.step = folder, step
        self.files = read_manifest(folder, step)

    def _where(self, file: str) -> str:
        return f"checkpoint {self.folder.uri}: {file}"

    def _check(self, file: str, size: int, sha256: str = "") -> None:
        entry = self.files[file]
        if size != entry["size"] or (sha256 and sha256 != entry["sha256"]):
            digest = f", SHA-256 {sha256[:16]}…" if sha256 else ""
            by_manifest = f"{short_repr(entry['size'])}, {entry['sha256'][:16]}…"
            raise ValueError(
                f"{self._where(file)} is damaged ({size} bytes{digest}; the manifest says "
                f"{by_manifest}); a copy, or another checkpoint of the run, is needed"
            )

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[HashingFile]:
        """The file; when the block ends, the rest of it is read and its hash compared."""
        if file not in self.files:
            raise ValueError(f"{self._where(file)} is missing from the manifest")
        try:
            self._check(file, self.folder.size(file))
            with self.folder.open_input(file) as source:
                hashing = HashingFile(source)
                damage = None
                try:
                    yield hashing
                except ValueError as error:
                    damage = error
                while hashing.read(1 << 20):
                    pass
        except FileNotFoundError:
            raise ValueError(f"{self._where(file)} is missing") from None
        except OSError as error:
            if is_outage(error):
                raise
            raise ValueError(f"{self._where(file)} cannot be read: {error}") from None
        self._check(file, hashing.size, hashing.sha256.hexdigest())
        if damage is not None:
            raise ValueError(f"{self._where(file)}: {damage}")

    def bytes(self, file: str) -> bytes:
        data = []
        with self._open(file) as hashing:
            data.append(hashing.read())
        return data[0]

    def object(self, file: str) -> dict[str, Any]:
        return parse_object(self._where(file), self.bytes(file))

    def tensors(self, file: str) -> dict[str, Tensor]:
        """ValueError, naming the tensor, also for one that is not finite."""
        tensors: dict[str, Tensor] = {}
        with self._open(file) as hashing:
            tensors = read_tensors(hashing, self.files[file]["size"])
        if (name := not_finite(tensors)) is not None:
            raise ValueError(
                f"{self._where(file)}: {name} has values that are not finite: the run had "
                "diverged; an earlier checkpoint is needed"
            )
        return tensors

    def config(self) -> RunConfigFile:
        values = self.object("config.json")
        try:
            model = configs.from_json(ModelConfig, values["model"])
            tokenizer = values["tokenizer"]
            if not isinstance(tokenizer, str):
                raise ValueError(f"tokenizer={short_repr(tokenizer)} is no fingerprint")
        except KeyError as error:
            raise ValueError(f"{self._where('config.json')} has no field {error}") from None
        except ValueError as error:
            raise ValueError(f"{self._where('config.json')}: {error}") from None
        return RunConfigFile(model, tokenizer)

    def trainer(self) -> dict[str, Any]:
        """trainer.json, with the fields of its ``train_config`` under their present names."""
        trainer = self.object("trainer.json")
        if isinstance(train := trainer.get("train_config"), dict):
            train = configs.with_new_names("TrainConfig", train)
            if isinstance(optim := train.get("optim"), dict):
                train["optim"] = configs.with_new_names("OptimConfig", optim)
            trainer["train_config"] = train
        return trainer

    def tokenizer(self, config: RunConfigFile) -> Tokenizer:
        where = self._where("tokenizer.json")
        try:
            tokenizer = Tokenizer.from_json(self.bytes("tokenizer.json").decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is damaged: {error}") from None
        except RecursionError:
            raise ValueError(f"{where} is damaged: it is nested too deep") from None
        if tokenizer.fingerprint != config.tokenizer:
            raise ValueError(
                f"{where} ({tokenizer.fingerprint[:16]}…) is "
                f"not the one that the weights were trained with ({config.tokenizer[:16]}…)"
            )
        if tokenizer.vocab_size != config.model.vocab_size:
            raise ValueError(
                f"{where} has {tokenizer.vocab_size} tokens, and the model of config.json "
                f"vocab_size={config.model.vocab_size}"
            )
        return tokenizer

    def model(self, config: ModelConfig, dtype: torch.dtype) -> GPT:
        """The model with its weights, in training's float32."""
        weights = self.tensors("weights.msgpack")
        _check_size(self._where("config.json"), config, weights)
        try:
            model = GPT(config, compute_dtype=dtype)
        except (ArithmeticError, RuntimeError) as error:  # values that no model can have
            raise ValueError(f"{self._where('config.json')} makes no model: {error}") from None
        load_weights(model, weights, self._where("weights.msgpack"))
        return model


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


def _check_size(where: str, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """ValueError for a configuration of far more layers or channels than the weights have.

    Checked before the model is built: one of 10^9 layers would take all memory and hours.
    """
    table = weights.get("transformer.wte.weight")
    shape = (config.padded_vocab_size, config.n_embd)
    if table is None or tuple(table.shape) != shape or config.n_layer > len(weights):
        raise ValueError(
            f"{where} does not fit weights.msgpack: n_layer={config.n_layer}, "
            f"n_embd={config.n_embd} and {config.padded_vocab_size} tokens with padding; there "
            f"are {len(weights)} tensors, and embeddings "
            f"{'are missing' if table is None else list(table.shape)}"
        )


def load_weights(model: GPT, weights: Mapping[str, Tensor], where: str) -> None:
    """Fills ``model``. ValueError names the first tensor that is missing, unknown or of another
    shape."""
    parameters = dict(model.named_parameters())
    for name in sorted({*parameters, *weights}):
        have = list(weights[name].shape) if name in weights else "nothing"
        need = list(parameters[name].shape) if name in parameters else "nothing"
        if have != need:
            raise ValueError(
                f"{where} does not fit the model: {short_repr(name)} is {have}, expected {need}"
            )
    model.load_state_dict(dict(weights))
