"""Text as it comes is the text as a whole, however it is cut."""

from __future__ import annotations

import random

import pytest

from nanochat_ray.engine.detokenizer import IncrementalDetokenizer
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.serve.openai.logprobs import TextOffsets, for_chat, for_completion
from nanochat_ray.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes_only()
ALPHABET = ["a", "b", "ab", "aab", "é", "€", "😀", "👩‍👩‍👧‍👦", "stop", "\n", " "]


def cut_at_first_end(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: read character by character, and end when a stop string is complete."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


def split(rng: random.Random, tokens: list[int]) -> list[list[int]]:
    pieces = []
    while tokens:
        n = rng.randint(0, 4)
        pieces.append(tokens[:n])
        tokens = tokens[n:]
    return pieces


def test_any_split_gives_the_same_text() -> None:
    rng = random.Random(0)
    for _ in range(1500):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(0, 12)))
        stops = [
            "".join(rng.choices(ALPHABET, k=rng.randint(1, 3))) for _ in range(rng.randint(0, 3))
        ]
        raw = bytearray(text.encode())
        if rng.random() < 0.3:  # bytes that are no UTF-8
            raw.insert(rng.randint(0, len(raw)), rng.choice([0xFF, 0xC3, 0xF0, 0x80]))
        tokens = TOKENIZER.encode("")
        tokens = [TOKENIZER.ranks.index(bytes([b])) for b in raw]
        stream, texts = IncrementalDetokenizer(TOKENIZER, stops), []
        for piece in split(rng, tokens):
            texts.append(stream.push(piece))
        texts.append(stream.flush())
        want, is_stopped = cut_at_first_end(bytes(raw).decode(errors="replace"), stops)
        assert ("".join(texts), stream.is_stopped) == (want, is_stopped)


@pytest.mark.parametrize(
    ("stops", "text", "want"),
    [(["abcd", "bc"], "xabcdy", "xa"), (["ab", "aab"], "xaaby", "x"), (["b", "a"], "xxab", "xx")],
)
def test_the_stop_that_is_complete_first_ends_the_text(
    stops: list[str], text: str, want: str
) -> None:
    """Of one step, in any order; of two that end together, the longer one."""
    for order in (stops, stops[::-1]):
        stream = IncrementalDetokenizer(TOKENIZER, order)
        assert stream.push(TOKENIZER.encode(text)) == want


def test_nothing_is_held_back_without_need() -> None:
    stream = IncrementalDetokenizer(TOKENIZER, ["</end>"])
    assert stream.push(TOKENIZER.encode("a < b, a <")) == "a < b, a "
    assert stream.push(TOKENIZER.encode("/en")) == ""
    assert stream.push(TOKENIZER.encode("glish")) == "</english"
    assert stream.push(TOKENIZER.encode("x</end>y")) == "x"
    assert stream.is_stopped
    assert stream.push(TOKENIZER.encode("z")) + stream.flush() == ""


def test_a_character_is_never_split() -> None:
    stream = IncrementalDetokenizer(TOKENIZER)
    pieces = [stream.push([token]) for token in TOKENIZER.encode("é😀")]
    assert pieces == ["", "é", "", "", "", "😀"]
    assert stream.push(TOKENIZER.encode("😀")[:2]) == ""
    assert stream.flush() == "�"


def test_stop_strings_wait_for_min_tokens() -> None:
    stream = IncrementalDetokenizer(TOKENIZER, ["ab"])
    parts = [stream.push([t], i >= 5) for i, t in enumerate(TOKENIZER.encode("xababababz"))]
    assert ("".join(parts), stream.is_stopped) == ("xabab", True)


def test_ids_that_are_no_token_have_no_text() -> None:
    tokenizer = Tokenizer.bytes_only()
    padding = tokenizer.vocab_size + 3  # a model's vocabulary may be padded
    stream = IncrementalDetokenizer(tokenizer, ["never"])
    assert stream.push([65, padding, 66]) + stream.flush() == "AB"
    score = TokenLogprob(logprob=-1.0, top=[(padding, -1.0)])
    assert for_chat(tokenizer, [(padding, score)])["content"][0]["bytes"] == []
    offsets = TextOffsets(tokenizer)
    assert for_completion(tokenizer, [(padding, score), (65, score)], offsets)["text_offset"] == [
        0,
        0,
    ]
