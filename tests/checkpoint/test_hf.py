"""What goes out is what transformers loads by itself, and what comes back is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from nanochat_ray.checkpoint import hf
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.chat import render_prompt
from nanochat_ray.text.tokenizer import Tokenizer

TEXTS = (
    "Hello world, it's 12345 o'clock!",
    "  two  spaces\n\n\tand tabs\r\n   ",
    "naïve café — 日本語 😀👩‍👩‍👧 \u200b",
    "def f(x):\n    return x**2  # square",
    "<|bos|",
    "",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    corpus = [Path(__file__).read_text(), Path(hf.__file__).read_text(), *TEXTS] * 3
    return Tokenizer.train(corpus, 700)


def model_for(tokenizer: Tokenizer, **fields: object) -> GPT:
    model = GPT(tiny_config("classic", vocab_size=tokenizer.vocab_size, **fields))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("pad", [1, 64])
def test_transformers_gives_the_same_logits(tokenizer: Tokenizer, tmp_path: Path, pad: int) -> None:
    from transformers import AutoModelForCausalLM

    model = model_for(tokenizer, pad_vocab_to=pad)
    hf.export(model, tokenizer, tmp_path, dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, tokenizer.vocab_size, (3, 32), generator=torch.manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(ids), peer(ids).logits
    assert type(peer).__name__ == "NanoChatForCausalLM"
    assert (ours - theirs).abs().max() <= 1e-4
    assert ours.std() > 0.1

    back, same = hf.import_folder(tmp_path)
    assert same.fingerprint == tokenizer.fingerprint
    # Bits of logits are not compared: padding changes the shapes of products, which on some CPUs
    # changes the order of sums.
    size, weights = tokenizer.vocab_size, dict(back.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weights[name][:size], weight[:size]), name


def test_a_folder_that_transformers_wrote_comes_in(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf.export(model_for(tokenizer), tokenizer, tmp_path / "one", dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32).eval()
    peer.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "tokenizer.json").write_bytes(
        (tmp_path / "one" / "tokenizer.json").read_bytes()
    )
    model, _ = hf.import_folder(tmp_path / "two")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (model(ids) - peer(ids).logits).abs().max() <= 1e-4


def test_transformers_tokenizes_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    hf.export(model_for(tokenizer), tokenizer, tmp_path, dtype=torch.float32)
    peer = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert peer.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert peer.decode(tokenizer.encode(text)) == text
    for messages in (
        [{"role": "user", "content": "Hi 12!"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
            {"role": "user", "content": "More"},
        ],
        [{"role": "system", "content": "Be brief."}],
        [{"role": "user", "content": "Hi"}, {"role": "user", "content": "there"}],
        [
            {"role": "assistant", "content": "Yo"},
            {"role": "assistant", "content": "ho"},
            {"role": "system", "content": ""},
            {"role": "user", "content": "Hi"},
            {"role": "system", "content": "Be brief."},
        ],
    ):
        rendered = peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert peer.encode(rendered, add_special_tokens=False) == render_prompt(tokenizer, messages)


def test_a_modern_model_cannot_go_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes_only()
    with pytest.raises(ValueError, match=r"cannot express value_embeds=True.*qk_scale=1\.2"):
        hf.export(GPT(tiny_config()), tokenizer, tmp_path, dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_fit_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        hf.import_folder(tmp_path)
    hf.export(model_for(tokenizer), tokenizer, tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' must be 'relu2'"),
        ({"hidden_size": 64, "intermediate_size": 256}, "do not fit"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* is missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            hf.import_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"rubbish" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        hf.import_folder(tmp_path)
