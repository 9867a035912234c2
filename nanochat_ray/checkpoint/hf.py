"""To and from a Hugging Face folder: safetensors, config.json and tokenizer.json.

A model of the ``classic`` preset goes out as ``NanoChatForCausalLM`` (nanochat of October 2025),
which transformers, vLLM and others load by themselves. Others go out with the modelling file in
``remote_code``, for transformers with ``trust_remote_code=True``. Both come back in.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat_ray.checkpoint import hf_remote
from nanochat_ray.checkpoint.folder import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    Fields,
    read_json,
    regular,
    writing,
)
from nanochat_ray.checkpoint.hf_tokenizer import WHAT, read_tokenizer, tokenizer_json
from nanochat_ray.checks import short_repr
from nanochat_ray.model.config import COMMON_OPTIONS, ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer

_NOT_EXPORTED = ("pad_vocab_to", "dropout")
_EXPORTED = COMMON_OPTIONS - {"document_start", "skips", "attention_gate", "rope_factor"}
_REMOTE_CODE = Path(__file__).parent / "remote_code"
# The name in transformers to the name here; {} is the layer.
_NAMES = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "lm_head.weight": "lm_head.weight",
    "model.layers.{}.self_attn.q_proj.weight": "transformer.h.{}.attn.c_q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "transformer.h.{}.attn.c_k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "transformer.h.{}.attn.c_v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "transformer.h.{}.attn.c_proj.weight",
    "model.layers.{}.mlp.fc1.weight": "transformer.h.{}.mlp.c_fc.weight",
    "model.layers.{}.mlp.fc2.weight": "transformer.h.{}.mlp.c_proj.weight",
}
_CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def _names(layers: int) -> dict[str, str]:
    return {
        hf_name.format(i): name.format(i)
        for hf_name, name in _NAMES.items()
        for i in (range(layers) if "{}" in name else range(1))
    }


# --- the folder ---------------------------------------------------------------------------------


def _is_classic(config: ModelConfig) -> bool:
    """Whether transformers' own NanoChatForCausalLM can express the model."""
    shape = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len")
    classic = ModelConfig.classic(
        **{name: getattr(config, name) for name in shape},
        rope_base=config.rope_base,
        softcap=config.softcap,
        norm_eps=config.norm_eps,
    )
    same = (
        value == getattr(config, f) for f, value in vars(classic).items() if f not in _NOT_EXPORTED
    )
    return all(same)


def _check_exportable(config: ModelConfig) -> None:
    """ValueError for features that neither transformers nor our own modelling file has."""
    wrong = config.options_beyond(_EXPORTED)
    if wrong:
        fields = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise ValueError(f"a Hugging Face folder cannot express {fields}")


def export(
    model: GPT, tokenizer: Tokenizer, out: Store | Path | str, *, dtype: torch.dtype
) -> None:
    """Writes the folder ``out``, atomically.

    ValueError if the model has features that the architecture lacks, or if the folder has files
    that no export wrote.
    """
    _check_exportable(model.config)
    with writing(out if isinstance(out, Store) else Store.at(str(out))) as folder:
        _write(model, tokenizer, folder, dtype)


def _write(model: GPT, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    config = model.config
    classic = _is_classic(config)
    if not classic:
        for path in _REMOTE_CODE.glob("*.py"):
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = _export_tensors(model, dtype, classic=classic)
    _save(tensors, folder / "model.safetensors")
    end = tokenizer.special("<|assistant_end|>")
    # No padding: generate() would mask each <|bos|> of a prompt, and training freeze its embedding.
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": end, "pad_token_id": None}
    files: dict[str, Any] = {
        "config.json": {
            **_config_json(config),
            "dtype": str(dtype).removeprefix("torch."),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            **ids,
            **({} if classic else hf_remote.architecture(config)),
        },
        "generation_config.json": {**ids, "eos_token_id": [end, tokenizer.bos]},
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>",
            "pad_token": "<|bos|>",
            "model_max_length": config.sequence_len,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE.read_text("utf-8"),
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """OSError if the file cannot be written."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _export_tensors(model: GPT, dtype: torch.dtype, *, classic: bool) -> dict[str, Tensor]:
    """The weights under the names, and in the shapes, that the folder's architecture expects."""
    weights, config = model.state_dict(), model.config
    if not classic:
        return {n: w.detach().to("cpu", dtype).contiguous() for n, w in weights.items()}
    tensors = {}
    for hf_name, name in _names(config.n_layer).items():
        weight = weights[name]
        if name in ("transformer.wte.weight", "lm_head.weight"):
            weight = weight[: config.vocab_size]
        tensors[hf_name] = weight.detach().to("cpu", dtype).contiguous()
    return tensors


def _config_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of ``NanoChatForCausalLM``'s configuration."""
    return {
        "model_type": "nanochat",
        "architectures": ["NanoChatForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": config.softcap or None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }


# --- reading ------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    weight_map = read_json(index, WHAT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map={short_repr(weight_map)} is not allowed: an object")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(
                f"{index}: weight_map names {short_repr(name)}, which is no file of this folder"
            )
    return [folder / name for name in sorted(set(weight_map.values()))]


def _open(path: Path) -> Any:
    """A file of tensors, whose header is checked; none is read yet."""
    regular(path, WHAT)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """float32 weights by the names of ``GPT``, which are also those of the files of its own kind.

    Names, shapes and dtypes are checked against ``config`` before a tensor is read. ValueError
    names the file and the tensor.
    """
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in GPT(config).named_parameters()}
    is_own = read_json(folder / "config.json", WHAT).get("model_type") == hf_remote.MODEL_TYPE
    names = {name: name for name in shapes} if is_own else _names(config.n_layer)
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        with _open(path) as file:
            for hf_name in file.keys():  # noqa: SIM118 (not a mapping)
                if hf_name not in names:
                    raise ValueError(
                        f"{path}: tensor {short_repr(hf_name)} is not of this architecture"
                    )
                name = names[hf_name]
                part = file.get_slice(hf_name)
                shape, dtype = list(part.get_shape()), part.get_dtype()
                if shape != shapes[name]:
                    raise ValueError(
                        f"{path}: tensor {hf_name} has the shape {shape}, which does not fit "
                        f"config.json: {shapes[name]}"
                    )
                if dtype not in ("F32", "BF16", "F16"):
                    raise ValueError(
                        f"{path}: tensor {hf_name} is {dtype}, which is not allowed: F32, BF16, F16"
                    )
                if name in weights:
                    raise ValueError(f"{path}: tensor {hf_name} comes twice")
                weights[name] = file.get_tensor(hf_name).float()
                if not torch.isfinite(weights[name]).all():
                    raise ValueError(f"{path}: tensor {hf_name} has values that are not finite")
    for hf_name, name in names.items():
        if name not in weights:
            raise ValueError(f"{folder}: tensor {hf_name} is missing")
    return weights


def _count_tensors(folder: Path) -> int:
    count = 0
    for path in _weight_files(folder):
        with _open(path) as file:
            count += len(file.keys())
    return count


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's ``config.json`` describes. ValueError names the field."""
    path = folder / "config.json"
    values = read_json(path, WHAT)
    readers = {"nanochat": _read_classic, hf_remote.MODEL_TYPE: hf_remote.read}
    if (kind := values.get("model_type")) not in readers:
        known_types = " or ".join(map(repr, readers))
        raise ValueError(f"{path}: model_type={short_repr(kind)} is not {known_types}")
    try:
        config = readers[kind](path, values)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from None
    fields = Fields(path, values)
    fields.equal("intermediate_size", 4 * config.n_embd)
    fields.equal("hidden_act", "relu2")
    for name in ("attention_bias", "tie_word_embeddings"):
        fields.equal(name, False)
    return config


def _read_classic(path: Path, values: dict[str, Any]) -> ModelConfig:
    fields = Fields(path, values)
    heads = fields.int("num_attention_heads", MAX_WIDTH)
    rope = fields.object("rope_parameters")
    rope.equal("rope_parameters.rope_type", "default")
    rope.equal("rope_parameters.partial_rotary_factor", None, 1.0)
    fields.equal("rope_scaling", None)
    theta = fields.float("rope_theta", 1e12, 10_000.0)
    # null turns it off; where it is not written, transformers takes the default of its class.
    softcap = 0.0 if "final_logit_softcapping" in values else 15.0
    return ModelConfig.classic(
        vocab_size=fields.int("vocab_size", MAX_VOCABULARY),
        n_layer=fields.int("num_hidden_layers", MAX_LAYERS),
        n_head=heads,
        n_kv_head=fields.int("num_key_value_heads", MAX_WIDTH, heads),
        n_embd=fields.int("hidden_size", MAX_WIDTH),
        sequence_len=fields.int("max_position_embeddings", MAX_POSITIONS),
        norm_eps=fields.float("rms_norm_eps", 1.0),
        rope_base=rope.float("rope_parameters.rope_theta", 1e12, theta),
        softcap=fields.float("final_logit_softcapping", 1e6, softcap),
    )


def import_folder(folder: Path) -> tuple[GPT, Tokenizer]:
    """A float32 model and its tokenizer from a folder. ValueError names what does not fit."""
    config = read_config(folder)
    per_layer, have = len(_NAMES) - 2, _count_tensors(folder)
    if config.n_layer * per_layer > have:
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers={config.n_layer} does not fit the "
            f"{have} tensors of the weights: those of layer {(have - 2) // per_layer} are missing"
        )
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    check_tokenizer(folder, config, tokenizer)
    weights = read_weights(folder, config)
    model = GPT(config)  # only now, when the files have shown that it has this size
    model.load_state_dict(weights)
    return model.eval(), tokenizer


def check_tokenizer(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """ValueError if the tokenizer is not that of ``config.json``."""
    path = folder / "config.json"
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{path}: vocab_size={config.vocab_size} does not fit tokenizer.json, which has "
            f"{tokenizer.vocab_size} tokens"
        )
    fingerprint = read_json(path, WHAT).get("tokenizer_fingerprint", tokenizer.fingerprint)
    if fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{path}: tokenizer_fingerprint={short_repr(fingerprint)} is not that of "
            f"tokenizer.json, {tokenizer.fingerprint}"
        )
