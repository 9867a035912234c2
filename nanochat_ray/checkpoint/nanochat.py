"""Checkpoints of nanochat itself: ``model_*.pt``, ``meta_*.json`` and ``tokenizer.pkl``.

Two layouts are read: that of October 2025 to January 2026 (``classic``) and that since March 2026
(``modern``). Nothing in a file is executed: weights are loaded with ``weights_only=True``, and of
the tokenizer's pickle, a ``tiktoken.Encoding``, only its plain data are taken.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_ray.checkpoint.folder import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    Fields,
    read_json,
    regular,
)
from nanochat_ray.checks import short_repr
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer

WHAT = "nanochat checkpoint"
TOKENIZER_BYTES = 64 << 20
_MODEL_FILE = re.compile(r"model_(\d+)\.pt")
_TOKENIZER_FOLDERS = (".", "tokenizer", "../tokenizer", "../../tokenizer")
"""Where the tokenizer is beside a checkpoint: nanochat has ``base_checkpoints/d20`` and
``tokenizer`` in one folder."""
_SHAPE = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_MODERN = {"resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda"}
_ENCODING = ("tiktoken.core", "Encoding")
_LAYER_TENSORS = 6


def is_checkpoint(folder: Path) -> bool:
    return any(_MODEL_FILE.fullmatch(path.name) for path in folder.iterdir())


def import_folder(folder: Path) -> tuple[GPT, Tokenizer]:
    """The newest checkpoint of a folder as a float32 model, with its tokenizer.

    ValueError names the file and what is wrong in it.
    """
    step = max(
        (m[1] for path in folder.iterdir() if (m := _MODEL_FILE.fullmatch(path.name))),
        key=int,
    )
    path, meta = folder / f"model_{step}.pt", folder / f"meta_{step}.json"
    tensors = _tensors(path)
    config = _config(meta, path, tensors)
    tokenizer = _find_tokenizer(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{meta}: model_config.vocab_size={config.vocab_size} does not fit the tokenizer, "
            f"which has {tokenizer.vocab_size} tokens"
        )
    _check(path, tensors, config)
    model = GPT(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval(), tokenizer


# --- weights ------------------------------------------------------------------------------------


def _tensors(path: Path) -> dict[str, Tensor]:
    regular(path, WHAT)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no one class for a file that is damaged
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it has no tensors by name")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {short_repr(name)} is no tensor")
        # torch.compile puts this before every name.
        tensors[name.removeprefix("_orig_mod.")] = tensor
    if len(tensors) != len(content):
        raise ValueError(f"{path}: a tensor comes twice")
    return tensors


def _config(meta: Path, path: Path, tensors: Mapping[str, Tensor]) -> ModelConfig:
    values = read_json(meta, WHAT).get("model_config")
    if not isinstance(values, dict):
        raise ValueError(f"{meta}: model_config={short_repr(values)} is not allowed: an object")
    values = {f"model_config.{name}": value for name, value in values.items()}
    fields = Fields(meta, values)
    allowed_names = {f"model_config.{name}" for name in (*_SHAPE, "window_pattern")}
    if unknown := sorted(set(values) - allowed_names):
        raise ValueError(
            f"{meta}: {short_repr(unknown[0])} is no field of nanochat's that is known"
        )
    bounds = (MAX_POSITIONS, MAX_VOCABULARY, MAX_LAYERS, MAX_WIDTH, MAX_WIDTH, MAX_WIDTH)
    shape: dict[str, Any] = {
        name: fields.int(f"model_config.{name}", most)
        for name, most in zip(_SHAPE, bounds, strict=True)
    }
    if shape["n_layer"] * _LAYER_TENSORS > len(tensors):
        raise ValueError(
            f"{meta}: model_config.n_layer={shape['n_layer']} does not fit {path.name}, which has "
            f"{len(tensors)} tensors"
        )
    if "lm_head.weight" not in tensors:
        raise ValueError(f"{path}: tensor lm_head.weight is missing")
    exact = list(tensors["lm_head.weight"].shape[:1]) == [shape["vocab_size"]]
    shape["pad_vocab_to"] = 1 if exact else 64
    extra = _MODERN & set(tensors)
    if extra and extra != _MODERN:
        raise ValueError(
            f"{path}: tensor {min(_MODERN - extra)} is missing: this is a nanochat between January "
            "and March 2026, or the file is damaged; only those before and after can be read"
        )
    pattern = values.get("model_config.window_pattern", "L")
    if not isinstance(pattern, str):
        raise ValueError(
            f"{meta}: model_config.window_pattern={short_repr(pattern)} is not allowed"
        )
    try:
        if extra:
            return ModelConfig.modern(window_pattern=pattern.upper(), **shape)
        # nanochat leaves epsilon to torch, which takes float32's.
        eps = torch.finfo(torch.float32).eps
        return ModelConfig.classic(window_pattern=pattern.upper(), norm_eps=eps, **shape)
    except ValueError as error:
        raise ValueError(f"{meta}: model_config.{error}") from None


def _check(path: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """ValueError unless names, shapes and values are those of a model of ``config``."""
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in GPT(config).named_parameters()}
    for name in sorted({*shapes, *tensors}):
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name} is missing")
        if name not in shapes:
            raise ValueError(f"{path}: tensor {short_repr(name)} is not of this architecture")
        tensor = tensors[name]
        if list(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{path}: tensor {name} has the shape {list(tensor.shape)}, which does not fit "
                f"its model_config: {shapes[name]}"
            )
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise ValueError(f"{path}: tensor {name} is {tensor.dtype}, not of floats")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {name} has values that are not finite")


# --- the tokenizer ------------------------------------------------------------------------------


class _PlainData:
    """Stands for ``tiktoken.Encoding`` in a pickle: takes its state, does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# Python's own unpickler, not C's: that one allocates what a damaged pickle tells it to.
class _RestrictedUnpickler(pickle._Unpickler):
    """Makes numbers, texts, bytes, lists and dictionaries, and no other object."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _ENCODING:
            return _PlainData
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is never loaded")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names an object outside")


def _find_tokenizer(folder: Path) -> Tokenizer:
    for path_to in _TOKENIZER_FOLDERS:
        path = folder / path_to / "tokenizer.pkl"
        if path.exists():
            return read_tokenizer(Path(os.path.normpath(path)))
    raise ValueError(
        f"{folder} is no {WHAT}: tokenizer.pkl is missing; copy nanochat's folder tokenizer into it"
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in nanochat's ``tokenizer.pkl``; ValueError, naming it, for anything else."""
    regular(path, WHAT, TOKENIZER_BYTES)
    try:
        content = _RestrictedUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a pickled tiktoken.Encoding: {reason}"
        ) from None
    try:
        return _tokenizer(content)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def _tokenizer(content: Any) -> Tokenizer:
    state = content.state if type(content) is _PlainData else None
    if not isinstance(state, dict):
        raise ValueError("it is no tiktoken.Encoding with its own ranks")
    pattern, ranks, specials = (
        state.get(name) for name in ("pat_str", "mergeable_ranks", "special_tokens")
    )
    if not isinstance(pattern, str):
        raise ValueError(f"pat_str={short_repr(pattern)} is not allowed: a text")
    if not isinstance(ranks, dict) or not all(
        type(token) is bytes and type(rank) is int for token, rank in ranks.items()
    ):
        raise ValueError("mergeable_ranks must give a rank for each token's bytes")
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    if [rank for _, rank in by_rank] != list(range(len(by_rank))):
        raise ValueError("mergeable_ranks: its ranks have gaps")
    tokenizer = Tokenizer([token for token, _ in by_rank], pattern)
    if specials != tokenizer.specials:
        raise ValueError(
            f"special_tokens={short_repr(specials)} is not allowed: {', '.join(SPECIAL_TOKENS)}, "
            "in this order, after all others"
        )
    return tokenizer
