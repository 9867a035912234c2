"""Checkpoints of a run: saved whole or not at all, verified when they are read.

``runs/<run>/step-000100/`` holds config.json, weights.msgpack, optimizer.msgpack, trainer.json
and tokenizer.json, and last of all manifest.json with the size and SHA-256 of each. A folder
without a manifest is not a checkpoint, so a crash at any moment leaves the last whole one in place:
the newest whole one is the run's latest. ``runs/<run>/latest`` names it too, for people and
scripts; no reader depends on it. Nothing in a checkpoint depends on the number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat_ray import config as configs
from nanochat_ray.checkpoint.codec import read_tensors, write_tensors
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer

FORMAT = "nanochat_ray snapshot 1"
"""A name on disk, of a time when a checkpoint was called a snapshot: it stays."""
_LOG = logging.getLogger(__name__)


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
class Checkpoint:
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
    """ValueError for a name that ``name_of`` does not give."""
    digits = name.removeprefix("step-")
    # Not str.isdigit alone, which takes other scripts' digits and "²" too.
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 12):
        digits = ""
    if not digits or name_of(int(digits)) != name:
        shown = configs.shortened(name)
        raise ValueError(f"checkpoint={shown!r} is not allowed: a name such as {name_of(100)}")
    return int(digits)


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
    ``check_publish`` is called when all is written but the manifest; what it raises leaves the
    checkpoint unpublished. FloatingPointError, naming the tensor, before anything is written if
    one is not finite.
    """
    for file, tensors in (("weights", weights), ("optimizer state", optimizer or {})):
        if (bad := not_finite(tensors)) is not None:
            raise FloatingPointError(
                f"{file}: {bad} is not finite after step {step}: that checkpoint is not written, "
                "and the one before it is sound"
            )
    name = name_of(step)
    folder = run.child(name)
    arguments = (model_config, weights, optimizer, trainer, tokenizer, val_metric)
    _write(folder, step, *arguments, check_publish)
    run.write_text("latest", name)
    return name


def _write(
    folder: Store,
    step: int,
    model_config: ModelConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor] | None,
    trainer: Mapping[str, Any],
    tokenizer: Tokenizer,
    val_metric: float | None,
    check_publish: Callable[[], None] = lambda: None,
) -> None:
    """The files of a checkpoint, and last its manifest."""
    # What an earlier attempt left there is no checkpoint any more from here on.
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
        "format": FORMAT,
        "step": step,
        "score": val_metric if val_metric is not None and math.isfinite(val_metric) else None,
        "files": files,
    }
    check_publish()
    folder.write_text("manifest.json", json.dumps(manifest, indent=1))


def latest(run: Store) -> str | None:
    """Name of the newest complete checkpoint, or None if there is none.

    The folders decide, not the file ``latest``, which a crash may have left behind or emptied.
    """
    return next((name for name in _names(run) if _is_complete(run, name)), None)


def _is_complete(run: Store, name: str) -> bool:
    try:
        run.size(f"{name}/manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def resume_warnings(run: Store) -> list[str]:
    """One line for each thing that seemed newer than ``latest`` but is no complete checkpoint."""
    found = latest(run)
    lines = []
    for name in _names(run):
        if name == found:
            break
        lines.append(f"{name} is incomplete (it has no manifest.json): skipped")
    pointer = ""
    with contextlib.suppress(OSError):
        pointer = run.read_bytes("latest").decode(errors="replace").strip()
    if found is not None and pointer != found:
        shown = f"names {configs.shortened(pointer)!r}" if pointer else "is missing or empty"
        lines.append(f"the file latest {shown}; the newest complete checkpoint is {found}")
    return lines


def _find(run: Store, name: str | None) -> str:
    found = name or latest(run)
    if found is None:
        raise ValueError(f"run {run.uri} has no complete checkpoint")
    if name is None:
        for line in resume_warnings(run):
            _LOG.warning("run %s: %s", run.uri, line)
    return found


def _object(where: str, data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``. ValueError, naming ``where``, for anything else."""
    try:
        found = json.loads(data.decode())
    except RecursionError:
        raise ValueError(f"{where} is damaged: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {configs.shortened(str(error), 200)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is damaged: it is {configs.shortened(found)!r}, not an object")
    return found


def _manifest(run: Store, name: str) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of a checkpoint. ValueError if the manifest is damaged."""
    folder, step = run.child(name), step_of(name)
    where = f"checkpoint {folder.uri}: manifest.json"
    try:
        data = folder.read_bytes("manifest.json")
    except OSError:
        raise ValueError(f"{where} is missing: it is not whole") from None
    found = _object(where, data)
    if found.get("format") != FORMAT:
        raise ValueError(f"{where} is damaged: format={configs.shortened(found.get('format'))!r}")
    if found.get("step") != step:
        raise ValueError(f"{where} is of step {configs.shortened(found.get('step'))!r}, not {step}")
    files = found.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise ValueError(f"{where} is damaged: files={configs.shortened(files)!r}")
    return files


def _is_entry(value: Any) -> bool:
    """Whether a manifest's entry of a file has a size and a SHA-256."""
    sound = isinstance(value, dict) and type(value.get("size")) is int
    return sound and isinstance(value.get("sha256"), str)


class _Reader:
    """The files of one checkpoint, each checked against the manifest."""

    def __init__(self, run: Store, name: str):
        self.folder, self.files = run.child(name), _manifest(run, name)

    def _where(self, file: str) -> str:
        return f"checkpoint {self.folder.uri}: {file}"

    def _check(self, file: str, size: int, sha256: str = "") -> None:
        known = self.files[file]
        if size != known["size"] or (sha256 and sha256 != known["sha256"]):
            hashed = f", SHA-256 {sha256[:16]}…" if sha256 else ""
            expected = f"{configs.shortened(known['size'])}, {known['sha256'][:16]}…"
            raise ValueError(
                f"{self._where(file)} is damaged ({size} bytes{hashed}; the manifest says "
                f"{expected}); a copy, or another checkpoint of the run, is needed"
            )

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[_Hashed]:
        """The file as a stream; what is left of it when the block ends is read and checked."""
        if file not in self.files:
            raise ValueError(f"{self._where(file)} is missing from the manifest")
        try:
            self._check(file, self.folder.size(file))
            with self.folder.open_input(file) as source:
                stream = _Hashed(source)
                damage = None
                try:
                    yield stream
                except ValueError as error:
                    damage = error
                while stream.read(1 << 20):
                    pass
        except FileNotFoundError:
            raise ValueError(f"{self._where(file)} is missing") from None
        except OSError as error:
            raise ValueError(f"{self._where(file)} cannot be read: {error}") from None
        self._check(file, stream.size, stream.sha256.hexdigest())
        if damage is not None:
            raise ValueError(f"{self._where(file)}: {damage}")

    def bytes(self, file: str) -> bytes:
        data = []
        with self._open(file) as stream:
            data.append(stream.read())
        return data[0]

    def object(self, file: str) -> dict[str, Any]:
        return _object(self._where(file), self.bytes(file))

    def tensors(self, file: str) -> dict[str, Tensor]:
        """ValueError, naming the tensor, also for one that is not finite."""
        tensors: dict[str, Tensor] = {}
        with self._open(file) as stream:
            tensors = read_tensors(stream, self.files[file]["size"])
        if (name := not_finite(tensors)) is not None:
            raise ValueError(
                f"{self._where(file)}: {name} has values that are not finite: the run had "
                "diverged; an earlier checkpoint is needed"
            )
        return tensors

    def config(self) -> RunConfigFile:
        found = self.object("config.json")
        try:
            model = configs.from_json(ModelConfig, found["model"])
            tokenizer = found["tokenizer"]
            if not isinstance(tokenizer, str):
                raise ValueError(f"tokenizer={configs.shortened(tokenizer)!r} is no fingerprint")
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
    """Refuses a configuration of far more layers or channels than the weights have.

    Before a model is built of it: one of 10^9 layers would take all memory and hours.
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
    expected = dict(model.named_parameters())
    for name in sorted({*expected, *weights}):
        have = list(weights[name].shape) if name in weights else "nothing"
        need = list(expected[name].shape) if name in expected else "nothing"
        if have != need:
            raise ValueError(
                f"{where} does not fit the model: {configs.shortened(name)} is {have}, expected "
                f"{need}"
            )
    model.load_state_dict(dict(weights))


def load_config(run: Store, name: str | None = None) -> RunConfigFile:
    return _Reader(run, _find(run, name)).config()


def load_trainer(run: Store, name: str | None = None) -> dict[str, Any]:
    return _Reader(run, _find(run, name)).trainer()


def weights_digest(run: Store, name: str) -> str:
    """SHA-256 (hex) of a checkpoint's weights, as its manifest has it."""
    files = _manifest(run, name)
    if "weights.msgpack" not in files:
        raise ValueError(f"checkpoint {run.child(name).uri}: weights.msgpack is missing")
    return str(files["weights.msgpack"]["sha256"])


def load(run: Store, name: str | None = None, *, optimizer: bool) -> Checkpoint:
    """A verified checkpoint, by default the latest, with the optimizer's state if asked for.

    Raises ValueError, naming the file, if one is missing or damaged, if the tokenizer is not
    the one that belongs to the weights, or if a tensor is not finite.
    """
    name = _find(run, name)
    reader = _Reader(run, name)
    config = reader.config()
    return Checkpoint(
        name=name,
        step=step_of(name),
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
    reader = _Reader(run, _find(run, name))
    config = reader.config()
    tokenizer = reader.tokenizer(config)
    model = reader.model(config.model, dtype)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), tokenizer


def _scores(run: Store, names: Iterable[str]) -> dict[str, float]:
    """Those of the whole checkpoints that were validated, with what they were given.

    A damaged manifest gives no score: it is refused by name when its checkpoint is loaded.
    """
    found = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            score = _object(name, run.read_bytes(f"{name}/manifest.json")).get("score")
            if isinstance(score, int | float) and math.isfinite(score):
                found[name] = float(score)
    return found


def _names(run: Store) -> list[str]:
    """Folders of checkpoints, whole or not, the newest first; other names are not ours."""
    own = []
    for name in run.list():
        with contextlib.suppress(ValueError):
            own.append((step_of(name), name))
    return [name for _, name in sorted(own, reverse=True)]


def best(run: Store) -> str | None:
    """Name of the checkpoint with the lowest validation loss; None without a validation."""
    found = _scores(run, _names(run))
    return min(found, key=found.__getitem__) if found else None


def chosen(run: Store, name: str = "") -> str:
    """Name of the checkpoint that a user asks for: "" is the latest, "best" that by validation.

    Raises ValueError that names those there are.
    """
    found = latest(run) if not name else best(run) if name == "best" else name
    if found is not None and run.exists(found):  # whether it is whole shows when it is loaded
        return found
    whole = [n for n in _names(run) if run.exists(f"{n}/manifest.json")]
    if not whole:
        raise ValueError(f"run {run.uri} has no checkpoint")
    if name == "best":
        raise ValueError(f"checkpoint='best' is not in run {run.uri}: no validation was kept")
    raise ValueError(f"checkpoint={found!r} is not in run {run.uri}: it has {', '.join(whole)}")


def prune(run: Store, keep: int, *, keep_best: bool = False) -> None:
    """Removes all but the ``keep`` newest checkpoints, and what never became one.

    The newest whole one stays in any case, so does anything newer, and with ``keep_best`` the one
    with the best validation.
    """
    current = latest(run)
    if current is None:
        return
    names = _names(run)
    older = [n for n in names if step_of(n) < step_of(current)]
    whole = [n for n in older if _is_complete(run, n)]
    kept = set(whole[: keep - 1])
    if keep_best:
        scores = _scores(run, [current, *whole])
        kept |= {min(scores, key=scores.__getitem__)} if scores else set()
    for name in older:
        if name not in kept:
            # The manifest goes first: from then on it is no checkpoint, whatever is left of it.
            run.delete(f"{name}/manifest.json")
            run.delete(name)
