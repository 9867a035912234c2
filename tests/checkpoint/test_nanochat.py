"""nanochat's own checkpoints come in as they are, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from nanochat_ray.checkpoint import nanochat
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.damage import check_damage
from tests.tiny import tiny_config

TOKENIZER = Tokenizer.train(["the sea was calm and the sun was warm " * 9], 280)
SHAPE = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")


def encoding(**fields: Any) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(TOKENIZER.ranks)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    arguments = {"pat_str": TOKENIZER.pattern, "mergeable_ranks": ranks, "special_tokens": specials}
    return tiktoken.Encoding("rustbpe", **{**arguments, **fields})


def model_of(preset: str, **fields: Any) -> GPT:
    model = GPT(tiny_config(preset, vocab_size=TOKENIZER.vocab_size, **fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write(base: Path, model: GPT, step: int = 7, prefix: str = "") -> Path:
    """nanochat's folders: ``base_checkpoints/d2`` and ``tokenizer``."""
    folder = base / "base_checkpoints" / "d2"
    folder.mkdir(parents=True, exist_ok=True)
    (base / "tokenizer").mkdir(exist_ok=True)
    tensors = {prefix + name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save(tensors, folder / f"model_{step:06d}.pt")
    config = {name: getattr(model.config, name) for name in SHAPE}
    if model.config.smear:
        config["window_pattern"] = model.config.window_pattern
    meta = {"step": step, "val_bpb": 1.0, "model_config": config, "user_config": {"depth": 2}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding()))
    return folder


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("preset", ["classic", "modern"])
def test_both_layouts_come_in(tmp_path: Path, preset: str, prefix: str) -> None:
    # nanochat's epsilon is torch's for float32; that of the preset is transformers'
    eps = {"norm_eps": torch.finfo(torch.float32).eps}
    model = model_of(preset, **({"window_pattern": "SL"} if preset == "modern" else eps))
    write(tmp_path, model_of(preset), step=3)
    folder = write(tmp_path, model, step=1200, prefix=prefix)
    assert nanochat.is_checkpoint(folder)
    back, tokenizer = nanochat.import_folder(folder)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert back.config.window_pattern == model.config.window_pattern
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(back(ids), model(ids))


class _Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_pickle_is_executed(tmp_path: Path) -> None:
    folder = write(tmp_path, model_of("modern"))
    tokenizer, evil = tmp_path / "tokenizer" / "tokenizer.pkl", tmp_path / "evil"
    for bad, error in (
        (_Evil(evil), r"tokenizer\.pkl cannot be read as .*posix\.system, which is never loaded"),
        ([1], r"tokenizer\.pkl: it is no tiktoken\.Encoding"),
        (encoding(special_tokens={}), r"tokenizer\.pkl: special_tokens=\{\} is not allowed"),
        (encoding(pat_str=r"\w+"), None),
    ):
        tokenizer.write_bytes(pickle.dumps(bad))
        if error is None:
            assert nanochat.import_folder(folder)[1].pattern == r"\w+"
            continue
        with pytest.raises(ValueError, match=error):
            nanochat.import_folder(folder)
    tokenizer.write_bytes(pickle.dumps(encoding()))
    torch.save({"lm_head.weight": _Evil(evil)}, folder / "model_000007.pt")
    with pytest.raises(ValueError, match=r"model_000007\.pt cannot be read"):
        nanochat.import_folder(folder)
    assert not evil.exists()


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("n_layer", 10**9, "model_config.n_layer=1000000000 is not allowed"),
        ("n_layer", 9_000, "model_config.n_layer=9000 does not fit model_000007.pt"),
        ("n_embd", 2**20, "has the shape"),
        ("n_embd", "32", "model_config.n_embd='32' is not allowed"),
        ("n_head", 3, "model_config.n_embd=32 is not allowed"),
        ("vocab_size", 300, "model_config.vocab_size=300 does not fit the tokenizer"),
        ("window_pattern", "XL", "model_config.window_pattern='XL' is not allowed"),
        ("window_pattern", 3, "model_config.window_pattern=3 is not allowed"),
        ("dropout", 0.1, "'model_config.dropout' is no field"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: Any, error: str) -> None:
    folder = write(tmp_path, model_of("modern"))
    path = folder / "meta_000007.json"
    meta = json.loads(path.read_text())
    meta["model_config"][field] = value
    path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=error) as caught:
        nanochat.import_folder(folder)
    assert str(folder) in str(caught.value)


def test_a_layout_between_the_two_is_refused(tmp_path: Path) -> None:
    model = model_of("modern", smear=False, backout=False)
    folder = write(tmp_path, model)
    with pytest.raises(ValueError, match=r"backout_lambda is missing: .* January and March 2026"):
        nanochat.import_folder(folder)


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, model_of("modern"))
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.pkl", folder / "tokenizer.pkl")
    reference, _ = nanochat.import_folder(folder)
    shapes = {name: p.shape for name, p in reference.named_parameters()}

    def load(copy: Path) -> tuple[GPT, Tokenizer]:
        if not nanochat.is_checkpoint(copy):
            raise ValueError(f"{copy} has no model_*.pt")
        return nanochat.import_folder(copy)

    def same(pair: Any) -> bool:
        # Neither weights nor ranks have a checksum there: some flipped bits are other values.
        return {name: p.shape for name, p in pair[0].named_parameters()} == shapes

    check_damage(folder, load, same=same, count=150, seed=0)
