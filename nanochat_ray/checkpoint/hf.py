"""To and from a Hugging Face folder: safetensors, config.json and tokenizer.json.

The architecture there is ``NanoChatForCausalLM`` (nanochat of October 2025), so only a model with
the features of the ``classic`` preset can go out. transformers, vLLM and others load the folder by
themselves; nothing of theirs is needed to write or to read it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer

# Their names, with ours; {} is the layer.
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
# As text.chat renders: a system message is part of the user's turn, and neighbours of one role are
# one turn.
_CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% set ns = namespace(role='', text='') %}"
    "{% for m in messages %}"
    "{% set role = 'assistant' if m['role'] == 'assistant' else 'user' %}"
    "{% if ns.role and role != ns.role %}"
    "{{ '<|' + ns.role + '_start|>' + ns.text + '<|' + ns.role + '_end|>' }}"
    "{% set ns.text = '' %}"
    "{% endif %}"
    "{% set ns.role = role %}{% set content = m['content'] or '' %}"
    "{% set ns.text = ns.text + ('\n\n' if ns.text and content else '') + content %}"
    "{% endfor %}"
    "{% if ns.role %}"
    "{{ '<|' + ns.role + '_start|>' + ns.text + '<|' + ns.role + '_end|>' }}"
    "{% endif %}"
    "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)


def _names(layers: int) -> dict[str, str]:
    return {
        theirs.format(i): ours.format(i)
        for theirs, ours in _NAMES.items()
        for i in (range(layers) if "{}" in ours else range(1))
    }


# --- tokenizer.json -----------------------------------------------------------------------------


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it can be printed, else one from 256 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(spare)) for b in range(256)]


def _merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last merge that builds ``token``: BPE on its bytes with the earlier merges alone."""
    parts = [bytes([b]) for b in token]
    below = ranks[token]
    while len(parts) > 2:
        best = min(
            range(len(parts) - 1),
            key=lambda i: ranks.get(parts[i] + parts[i + 1], below),
        )
        if ranks.get(parts[best] + parts[best + 1], below) >= below:
            raise ValueError(f"token {token!r} cannot be built by merging two earlier tokens")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    letters = _byte_letters()
    ranks = {token: rank for rank, token in enumerate(tokenizer.ranks)}

    def spelled(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    merges = [
        [spelled(part) for part in _merge_of(token, ranks)]
        for token in tokenizer.ranks
        if len(token) > 1
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": number, "content": name, "special": True, **flags}
        for name, number in tokenizer.specials.items()
    ]
    bytes_as_is = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**bytes_as_is, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**bytes_as_is, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelled(token): rank for rank, token in enumerate(tokenizer.ranks)},
            "merges": merges,
        },
    }


def _tokenizer_from_json(found: dict[str, Any]) -> Tokenizer:
    byte_of = {letter: b for b, letter in enumerate(_byte_letters())}
    specials = {t["content"]: t["id"] for t in found.get("added_tokens", [])}
    vocab = {k: v for k, v in found["model"]["vocab"].items() if k not in specials}
    ranked = sorted(vocab.items(), key=lambda item: item[1])
    if [rank for _, rank in ranked] != list(range(len(ranked))):
        raise ValueError("tokenizer.json: its ids have gaps")
    ranks = [bytes(byte_of[letter] for letter in word) for word, _ in ranked]
    splits = [
        step["pattern"]["Regex"]
        for step in found["pre_tokenizer"].get("pretokenizers", [])
        if step["type"] == "Split"
    ]
    if len(splits) != 1:
        raise ValueError("tokenizer.json: one split by a regular expression is expected")
    tokenizer = Tokenizer(ranks, splits[0])
    if specials != tokenizer.specials:
        raise ValueError(
            f"tokenizer.json: its special tokens are {specials}; they must be "
            f"{', '.join(SPECIAL_TOKENS)}, in this order, after all others"
        )
    return tokenizer


# --- the folder ---------------------------------------------------------------------------------


def _check_exportable(config: ModelConfig) -> None:
    wanted = ModelConfig.classic(
        **{
            name: getattr(config, name)
            for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len")
        },
        rope_base=config.rope_base,
        softcap=config.softcap,
        norm_eps=config.norm_eps,
    )
    off = [f for f, v in vars(wanted).items() if v != getattr(config, f) and f != "pad_vocab_to"]
    if off or config.norm_eps is None:
        fields = ", ".join(f"{name}={getattr(config, name)!r}" for name in off or ["norm_eps"])
        raise ValueError(
            f"NanoChatForCausalLM cannot express {fields}: only models of the classic preset can "
            "be exported"
        )


def export(model: GPT, tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes ``folder``. ValueError if the model has features that the architecture lacks."""
    config = model.config
    _check_exportable(config)
    folder.mkdir(parents=True, exist_ok=True)
    ours = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for theirs, name in _names(config.n_layer).items():
        weight = ours[name]
        if name in ("transformer.wte.weight", "lm_head.weight"):
            weight = weight[: config.vocab_size]
        tensors[theirs] = weight.detach().to("cpu", dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    end = tokenizer.special("<|assistant_end|>")
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": end, "pad_token_id": tokenizer.bos}
    files: dict[str, Any] = {
        "config.json": {
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
            "dtype": str(dtype).removeprefix("torch."),
            **ids,
        },
        "generation_config.json": {**ids, "eos_token_id": [end, tokenizer.bos]},
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>",
            "pad_token": "<|bos|>",
            "model_max_length": config.sequence_len,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no Hugging Face folder: {name} is missing") from None
    except ValueError as error:
        raise ValueError(f"{folder / name} cannot be read: {error}") from None


def _tensors(folder: Path) -> dict[str, Tensor]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not single.exists() and index.exists():
        names = sorted(set(_json(folder, index.name)["weight_map"].values()))
    found: dict[str, Tensor] = {}
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (folder / name).exists():
            raise ValueError(f"{folder} is no Hugging Face folder: {name} is missing")
        try:
            found.update(load_file(folder / name))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} cannot be read: {error}") from None
    return found


def import_folder(folder: Path) -> tuple[GPT, Tokenizer]:
    """A float32 model and its tokenizer from a folder. ValueError names what does not fit."""
    found = _json(folder, "config.json")
    if found.get("model_type") != "nanochat":
        raise ValueError(
            f"{folder / 'config.json'}: model_type={found.get('model_type')!r} is not 'nanochat'"
        )
    try:
        tokenizer = _tokenizer_from_json(_json(folder, "tokenizer.json"))
        rope = found.get("rope_parameters") or {}
        heads = found["num_attention_heads"]
        config = ModelConfig.classic(
            vocab_size=found["vocab_size"],
            n_layer=found["num_hidden_layers"],
            n_head=heads,
            n_kv_head=found.get("num_key_value_heads") or heads,
            n_embd=found["hidden_size"],
            sequence_len=found["max_position_embeddings"],
            norm_eps=found["rms_norm_eps"],
            rope_base=float(rope.get("rope_theta", found.get("rope_theta", 10_000.0))),
            softcap=float(found.get("final_logit_softcapping") or 0.0),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: a field is missing or damaged: {error}") from None
    wanted = {
        "intermediate_size": 4 * config.n_embd,
        "hidden_act": "relu2",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    for name, value in wanted.items():
        if found.get(name, value) != value:
            raise ValueError(f"{folder / 'config.json'}: {name}={found[name]!r} must be {value!r}")
    theirs = _tensors(folder)
    names = _names(config.n_layer)
    for name in names:
        if name not in theirs:
            raise ValueError(f"{folder}: tensor {name} is missing")
    model = GPT(config)
    try:
        model.load_state_dict({ours: theirs[name].float() for name, ours in names.items()})
    except RuntimeError as error:
        raise ValueError(f"{folder}: the tensors do not fit config.json: {error}") from None
    return model.eval(), tokenizer
