"""Texts of a model in training: prompts of the dataset, greedy continuations, the calculator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.chat import render_conversation, render_prompt
from nanochat_ray.train import samples
from tests.tiny import TOKENIZER, tiny_config


def test_samples_are_greedy_within_the_context() -> None:
    model = GPT(tiny_config())
    model.init_weights(torch.Generator().manual_seed(0))
    model.eval()
    ids = [TOKENIZER.bos, 5, 9]
    tokens = samples.greedy(model, ids, 100, ends=[])
    assert len(tokens) == model.config.sequence_len - len(ids)
    whole = torch.tensor([ids + tokens])
    with torch.no_grad():
        assert model(whole)[0, 2:-1].argmax(dim=-1).tolist() == tokens
    assert samples.greedy(model, ids, 100, ends=[tokens[0]]) == []


@pytest.mark.parametrize("length", [8, 12, 24])
@pytest.mark.parametrize("stage", ["base", "sft"])
def test_samples_fit_into_a_short_context(stage: str, length: int) -> None:
    model = GPT(tiny_config(sequence_len=length))
    model.init_weights(torch.Generator().manual_seed(0))
    texts = ["ABCDEFGHIJKLMNOPQR", "abcdefghijklmnopqr", "012345678901234567"]
    ids = [[TOKENIZER.bos, *TOKENIZER.encode(text)] for text in texts]
    if stage == "sft":
        questions = ([{"role": "user", "content": text}] for text in texts)
        ids = [render_prompt(TOKENIZER, question) for question in questions]
    mask = np.array([[0] * len(row) + [1] for row in ids], dtype=np.uint8)
    rows = np.array([[*row, 65] for row in ids], dtype=np.uint16)
    sampler = samples.make_sampler(TOKENIZER, rows, mask if stage == "sft" else None, 48)
    prompts = [prompt for prompt, _ in sampler(model)]
    assert prompts == (texts if stage == "sft" else [text[:12] for text in texts])


def test_prompts_are_prefixes_of_documents() -> None:
    """In the language of the dataset, in whole characters, and different ones."""
    texts = [
        "天気がいいから",
        "   " * 5,
        "short",
        "天気がいい。",
        "What a nice day it is",
        "A rose is a",
    ]
    tokens = [t for text in (*texts, "Б" * 20) for t in (TOKENIZER.bos, *TOKENIZER.encode(text))]
    ids = np.array([tokens], dtype=np.uint16)
    prompts = samples.choose_prompts(TOKENIZER, ids, None)
    # A Japanese character is 3 bytes, a Russian one 2.
    want = ["天気がい", "What a nice ", "Б" * 6]
    assert prompts == {text: [TOKENIZER.bos, *TOKENIZER.encode(text)] for text in want}
    assert samples.choose_prompts(TOKENIZER, ids[:0], None) == {}


def test_prompts_are_the_first_questions_of_conversations() -> None:
    conversation = [
        {"role": "user", "content": "¿Quién eres?"},
        {"role": "assistant", "content": "Un modelo."},
        {"role": "user", "content": "¿Y tú?"},
        {"role": "assistant", "content": "También."},
    ]
    ids, mask = render_conversation(TOKENIZER, conversation)
    rows = np.array([[*ids, *ids], [TOKENIZER.bos] * (2 * len(ids))], dtype=np.uint16)
    masks = np.array([[*mask, *mask], [0] * (2 * len(ids))], dtype=np.uint8)
    prompt = render_prompt(TOKENIZER, conversation[:1])
    assert samples.choose_prompts(TOKENIZER, rows, masks) == {"¿Quién eres?": prompt}


def test_samples_run_the_calculator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always calls it: what follows the call is the result, as when it is served."""
    call = [TOKENIZER.special("<|python_start|>"), *TOKENIZER.encode("12+7")]
    call.append(TOKENIZER.special("<|python_end|>"))
    end = TOKENIZER.special("<|assistant_end|>")
    script = [*call, *TOKENIZER.encode("Yes"), end]
    rows: list[list[int]] = []

    def hidden(model: GPT, row: torch.Tensor, eager: bool = False) -> torch.Tensor:
        rows.append(row[0].tolist())
        return torch.zeros(1, row.shape[1], 1)

    def logits(model: GPT, x: torch.Tensor) -> torch.Tensor:
        token = script[(len(rows) - 1) % len(script)]
        return torch.nn.functional.one_hot(torch.tensor([token]), TOKENIZER.vocab_size).float()

    model = GPT(tiny_config(sequence_len=128))
    monkeypatch.setattr(GPT, "hidden", hidden)
    monkeypatch.setattr(GPT, "logits", logits)
    prompt = render_prompt(TOKENIZER, [{"role": "user", "content": "What is 12+7?"}])
    ids = np.array([[*prompt, *script]], dtype=np.uint16)
    mask = np.array([[0] * len(prompt) + [1] * len(script)], dtype=np.uint8)
    sampler = samples.make_sampler(TOKENIZER, ids, mask, 48)
    assert sampler(model) == [("What is 12+7?", "[12+7 = 19] Yes")]
    # The model reads the result before it goes on.
    assert [t for t in rows[-1] if t in TOKENIZER.encode("19")][-2:] == TOKENIZER.encode("19")
