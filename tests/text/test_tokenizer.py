from __future__ import annotations

import json
import pickle
import random

import pytest

from nanochat_ray.storage import Store
from nanochat_ray.text import tokenizer
from nanochat_ray.text.chat import render_conversation, render_prompt
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer

CORPUS = ["The quick brown fox, aged 12345, jumps over the lazy dog's bowl. " * 40]
USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(CORPUS, 330)


def test_every_text_comes_back(tok: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x2FFF)))) for _ in range(30)
        )
        assert tok.decode(tok.encode(text)) == text
        assert sum(tok.byte_lengths()[i] for i in tok.encode(text)) == len(text.encode())


def test_numbers_fall_into_groups_of_two(tok: Tokenizer) -> None:
    long = Tokenizer.train(["1234567 " * 500], 400)
    assert [long.decode([i]) for i in long.encode("1234567")] == ["12", "34", "56", "7"]


def test_special_tokens_in_text_are_text(tok: Tokenizer) -> None:
    text = "".join(SPECIAL_TOKENS)
    assert not set(tok.encode(text)) & set(tok.specials.values())
    assert tok.decode(tok.encode(text)) == text
    assert sorted(tok.specials.values()) == list(range(tok.vocab_size - 9, tok.vocab_size))


def test_saved_and_loaded_is_the_same(tok: Tokenizer, root: Store) -> None:
    tok.save(root)
    again = Tokenizer.load(root)
    assert again.fingerprint == tok.fingerprint
    assert again.encode(CORPUS[0]) == tok.encode(CORPUS[0])
    assert pickle.loads(pickle.dumps(tok)).fingerprint == tok.fingerprint
    assert Tokenizer.train(CORPUS, 330).fingerprint == tok.fingerprint
    assert Tokenizer.train(CORPUS, 290).fingerprint != tok.fingerprint


def test_a_damaged_file_is_refused(tok: Tokenizer) -> None:
    good = json.loads(tok.to_json())
    for change in (
        {"format": "x"},
        {"specials": ["<|bos|>"]},
        {"tokens": good["tokens"][1:]},
        {"tokens": [*good["tokens"], good["tokens"][0]]},
        {"tokens": ["*"]},
    ):
        with pytest.raises(ValueError, match=r"tokenizer"):
            Tokenizer.from_json(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_json("rubbish")
    with pytest.raises(ValueError, match="vocab_size=200 is not allowed: 265 or more"):
        Tokenizer.train(["x"], 200)


def test_the_mask_marks_what_the_assistant_says(tok: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+1? <|assistant_end|>"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "so "},
                {"type": "python", "text": "1+1"},
                {"type": "python_output", "text": "2"},
                {"type": "text", "text": "2!"},
            ],
        },
    ]
    ids, mask = render_conversation(tok, messages)
    text = "".join(
        next((n for n, i in tok.specials.items() if i == t), None) or tok.decode([t])
        for t, m in zip(ids, mask, strict=True)
        if m
    )
    assert text == "so <|python_start|>1+1<|python_end|>2!<|assistant_end|>"
    assert ids.count(tok.special("<|assistant_end|>")) == 1
    assert tok.decode(ids).startswith("<|bos|><|user_start|>Be kind.\n\n1+1?")
    prompt = render_prompt(tok, messages[:2])
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "at least one"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\]\.role='bot'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content: a text"),
        ([USER, "hi"], r"messages\[1\]='hi': a dict with role and content"),
        ([USER, {"role": "assistant"}], r"messages\[1\]\.content: a text or parts .*, not None"),
        ([USER, {"role": "assistant", "content": 7}], r"messages\[1\]\.content: .*, not 7"),
        ([USER, {"role": "assistant", "content": ["a"]}], r"messages\[1\]\.content: .*'a'"),
        ([USER, {"role": "assistant", "content": [{"type": "image"}]}], "type='image': one of"),
        ([USER, {"role": "assistant", "content": [{"type": "python"}]}], "text=None: a text"),
    ],
)
def test_wrong_messages_are_refused(tok: Tokenizer, messages: list, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        render_conversation(tok, messages)


def test_cut_runs_change_no_other_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tok = Tokenizer.train([" ".join(CORPUS) + " " * 64 + "\n\n \t" * 50], 330)
    rng = random.Random(0)
    pieces = [" ", "\n", "\t", "\u00a0", "\u3000", "a", "b's", "12", "!", " fox", "\x1c", "\u0301"]
    texts = [
        "".join(rng.choices(pieces, rng.choices(range(1, 20), k=12), k=60)) for _ in range(300)
    ]
    whole = [tok.encode(text) for text in texts]
    monkeypatch.setattr(tokenizer, "MAX_WHITE_SPACE", 40)
    assert [tok.encode(text) for text in texts] == whole
    for before, after in (("fox", " dog"), ("", ""), ("12!", "\nfox's"), ("\x1c", "\x1c")):
        text = before + " " * 97 + after
        assert tok.decode(tok.encode(text)) == text
        start, end = (tok.encode(part) for part in (before, after))
        assert tok.encode(text)[: len(start)] == start
        assert not end or tok.encode(text)[-1] == end[-1]


@pytest.mark.parametrize("space", [" ", "\u00a0", "\n "[1:] + "\t"])
def test_a_million_white_spaces_are_tokens(space: str) -> None:
    tok = Tokenizer.bytes_only()
    text = "a" + (space * 1_100_000)[:1_100_000] + "b"
    assert tok.decode(tok.encode(text)) == text


def test_panic_of_a_foreign_pattern_is_an_error() -> None:
    tok = Tokenizer([bytes([b]) for b in range(256)], r"(?:a|ab)*(?!\S)c|[\s\S]")
    with pytest.raises(ValueError, match=r"pattern="):
        tok.encode("a" * 2_000_000)


def test_byte_tokenizer_by_hand() -> None:
    tok = Tokenizer.bytes_only()
    assert tok.encode("hé\n") == [104, 0xC3, 0xA9, 10]
    assert tok.vocab_size == 265
    specials = [tok.special(name) for name in SPECIAL_TOKENS]
    assert specials == list(range(256, 265))
    assert SPECIAL_TOKENS[:5] == (
        "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    )  # fmt: skip
    assert tok.bos == 256
    assert tok.byte_lengths().tolist() == [1] * 256 + [0] * 9
    assert tok.byte_table()[97:99] == [b"a", b"b"]
    assert tok.byte_table()[256:] == [b""] * 9
    assert tok.decode([104, 0xC3, 256, 300]) == "h�<|bos|>"
    assert tok.token_bytes(257) == b"<|user_start|>"


def test_merges_and_lengths_by_hand() -> None:
    """The most frequent pair is merged first: "ab", then "abab"; no token crosses a line's end."""
    tok = Tokenizer.train(["abab\n" * 50 + "ab\n" * 30], 265 + 2)
    assert tok.ranks[256:] == (b"ab", b"abab")
    assert tok.encode("abab ab") == [257, 32, 256]
    assert tok.byte_lengths()[[256, 257, 258]].tolist() == [2, 4, 0]
    assert tok.decode_bytes([257, 256, 98]) == b"abababb"


def test_recorded_fingerprint() -> None:
    """Another one would make every stored dataset and checkpoint foreign."""
    fingerprint = "72a895ac21224dec27d303bbc602deba19e64b067c55925f6869711cfbbf9170"
    assert Tokenizer.bytes_only().fingerprint == fingerprint
