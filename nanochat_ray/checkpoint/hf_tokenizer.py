"""tokenizer.json of a Hugging Face folder: to and from this project's tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat_ray.checkpoint.folder import read_json
from nanochat_ray.checks import short_repr
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer

WHAT = "Hugging Face folder"
# chat_template.jinja writes the name of a special token in a client's text with this mark, which is
# no text of the tokenizer's: special tokens are looked for before it is taken out.
_NORMALIZER = {"type": "Replace", "pattern": {"String": "<\ue000|"}, "content": "<|"}


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it can be printed, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


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


def _post_processor(bos: int) -> dict[str, Any]:
    """Puts <|bos|> before a document, as in training; a chat template has its own."""
    start = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    token = {"id": "<|bos|>", "ids": [bos], "tokens": ["<|bos|>"]}
    return {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, second],
        "special_tokens": {"<|bos|>": token},
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    letters = _byte_letters()
    ranks = {token: rank for rank, token in enumerate(tokenizer.ranks)}

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    merges = [
        [spell(part) for part in _merge_of(token, ranks)]
        for token in tokenizer.ranks
        if len(token) > 1
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special_tokens = [
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
        "added_tokens": special_tokens,
        "normalizer": _NORMALIZER,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**bytes_as_is, "use_regex": False}],
        },
        "post_processor": _post_processor(tokenizer.bos),
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
            "vocab": {spell(token): rank for rank, token in enumerate(tokenizer.ranks)},
            "merges": merges,
        },
    }


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``.

    ValueError, naming the file, if it is damaged or splits, merges or spells in another way than
    the tokenizers here can.
    """
    document = read_json(path, WHAT)
    try:
        return _tokenizer_from_json(document)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: a field is missing or of the wrong type: {error!r}") from None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def _tokenizer_from_json(document: dict[str, Any]) -> Tokenizer:
    byte_of = {letter: b for b, letter in enumerate(_byte_letters())}
    specials = {t["content"]: t["id"] for t in document.get("added_tokens", [])}
    model = document["model"]
    vocab = {word: rank for word, rank in model["vocab"].items() if word not in specials}
    if any(type(rank) is not int for rank in vocab.values()):
        raise ValueError("model.vocab: its ids are not all whole numbers")
    by_rank = sorted(vocab.items(), key=lambda item: item[1])
    if [rank for _, rank in by_rank] != list(range(len(by_rank))):
        raise ValueError("model.vocab: its ids have gaps")
    for word, _ in by_rank:
        if not all(letter in byte_of for letter in word):
            raise ValueError(f"model.vocab: {short_repr(word)} is not spelled in bytes")
    ranks = [bytes(byte_of[letter] for letter in word) for word, _ in by_rank]
    steps = document["pre_tokenizer"].get("pretokenizers", [])
    splits = [step for step in steps if step["type"] == "Split"]
    if len(splits) != 1 or not isinstance(splits[0]["pattern"]["Regex"], str):
        raise ValueError("pre_tokenizer: one split by a regular expression is expected")
    tokenizer = Tokenizer(ranks, splits[0]["pattern"]["Regex"])
    if specials != tokenizer.specials:
        raise ValueError(
            f"added_tokens: its special tokens are {short_repr(specials)}; they must be "
            f"{', '.join(SPECIAL_TOKENS)}, in this order, after all others"
        )
    _check_same_behaviour(document, tokenizer_json(tokenizer))
    return tokenizer


def _check_same_behaviour(document: dict[str, Any], own: dict[str, Any]) -> None:
    """ValueError where ``document`` works differently from ``own``, what is exported for it."""
    for name in ("normalizer", "post_processor", "truncation", "padding"):
        if document.get(name) not in (None, own[name]):
            raise ValueError(f"{name}={short_repr(document[name])} is not allowed: null")
    steps, own_steps = (d["pre_tokenizer"]["pretokenizers"] for d in (document, own))
    if len(steps) != len(own_steps):
        kinds = ", ".join(str(step["type"]) for step in steps)
        raise ValueError(f"pre_tokenizer={short_repr(kinds)} is not allowed: Split, ByteLevel")
    for step, own_step in zip(steps, own_steps, strict=True):
        for name in ("type", "behavior", "invert", "add_prefix_space", "use_regex"):
            if step.get(name, own_step.get(name)) != own_step.get(name):
                raise ValueError(f"pre_tokenizer.{name}={short_repr(step[name])} is not allowed")
    model = document["model"]
    for name, value in own["model"].items():
        if name in ("vocab", "merges"):
            continue
        if (model.get(name) or None) != (value or None):
            raise ValueError(f"model.{name}={short_repr(model[name])} is not allowed: {value!r}")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if merges != own["model"]["merges"]:
        raise ValueError("model.merges: they are not those that build its ids in their order")
