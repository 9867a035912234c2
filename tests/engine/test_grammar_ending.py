"""Structured answers are valid JSON when their tokens run out."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.engine.grammar_ending import Preferences, Quotes
from nanochat_ray.text.tokenizer import Tokenizer
from tests.engine.engine_kit import ask, finish, make_engine, make_model, tokens

TOK = Tokenizer.bytes_only()
ITEM = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "tags": {"type": "array"}, "x": {"type": "number"}},
    "required": ["id", "tags", "x"],
    "additionalProperties": False,
}
SCHEMAS: list[Any] = [
    {"type": "string"},
    {"type": "array", "items": ITEM},
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "items": {"type": "array", "items": ITEM}},
        "required": ["name", "items"],
        "additionalProperties": False,
    },
]


def answers(grammar: dict[str, Any], limit: int, **fields: Any) -> list[list[int]]:
    engine = make_engine(make_model("classic"), token_bytes=TOK.byte_table(), **fields)
    for seed in range(4):
        request = ask(
            str(seed),
            [1, 2, 3],
            grammar=grammar,
            temperature=5.0,
            seed=seed,
            max_tokens=limit,
            eos_ids=(TOK.bos,),
        )
        engine.add(request)
    outputs = finish(engine)
    return [tokens(outputs[str(seed)]) for seed in range(4)]


def text(ids: list[int]) -> str:
    return TOK.decode([t for t in ids if t != TOK.bos])


@pytest.mark.parametrize("limit", [30, 60, 110])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_json_ends_before_its_limit(schema: Any, limit: int) -> None:
    for ids in answers({"json_schema": schema}, limit):
        assert len(ids) <= limit
        jsonschema.validate(json.loads(text(ids)), schema)


def test_any_json_object_ends_before_its_limit() -> None:
    for ids in answers({"json_object": True}, 40):
        assert isinstance(json.loads(text(ids)), dict)


def test_forced_calls_end_before_their_limit() -> None:
    call = {"begin": '{"name":"f","arguments":', "schema": SCHEMAS[2], "end": "}"}
    for ids in answers({"structures": [call]}, 100):
        assert json.loads(text(ids))["name"] == "f"


def test_closing_is_the_same_after_a_move() -> None:
    grammar = {"json_schema": SCHEMAS[2]}
    whole = answers(grammar, 70)[0]
    assert answers(grammar, 70, num_speculative_tokens=0)[0] == whole
    for at in range(3, len(whole) - 1, 17):
        engine = make_engine(make_model("classic"), token_bytes=TOK.byte_table())
        params = {"temperature": 5.0, "seed": 0, "max_tokens": 70, "eos_ids": (TOK.bos,)}
        engine.add(ask("a", [1, 2, 3], whole[:at], grammar=grammar, **params))
        assert whole[:at] + tokens(finish(engine)["a"]) == whole


def test_token_beside_the_path_is_followed_too() -> None:
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    state = grammars.start({"json_schema": {"type": "string"}}, [TOK.bos], TOK.encode('"abc'), 40)
    assert state.closing is not None
    while state.closing.path is None:
        state.feed(TOK.encode("x"))
    for token in TOK.encode("yz"):  # not what the path says
        state.feed([token])
        assert state.closing.path == TOK.encode('"')
    assert state.error is None
    while state.closing.path:
        state.feed(state.closing.path[:1])
    assert state.matcher.is_accepting()


def test_limit_too_small_for_any_end_is_no_error() -> None:
    for ids in answers({"json_schema": SCHEMAS[2]}, 5):
        assert len(ids) == 5


ROW = {
    "type": "object",
    "properties": {"id": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["id", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "prefix", "repeat", "limit", "looks", "tokens_left", "path"),
    [
        # 8 tokens left: the quote, the token that ends the answer, and 6 to spare.
        ({"type": "string"}, '"', "x", 20, [], 8, '"'),
        # The first look, at 100 tokens left, spares a quarter: the next comes (97 - 25 - 32) // 4
        # tokens later. The end comes 9 closer between two looks, so 9 + 2 tokens are spared.
        ({"type": "string"}, '"', "x", 100, [90, 82, 75, 70, 66, 62, 59, 57, 55, 53], 13, '"'),
        (
            *({"type": "string"}, '"', "x", 300),
            *([242, 205, 177, 156, 141, 129, 120, 114, 109, 105, 102, 100], 61, '"'),
        ),
        (
            *({"type": "array", "items": {"type": "integer"}}, "[", "1,", 100),
            *([90, 82, 75, 70, 66, 62, 59, 57, 55], 13, "0]"),
        ),
        (
            *({"type": "array", "items": ROW}, "[", '{"id":1,"tags":[]},', 300),
            [242, 214, 191, 173, 159, 150, 141, 137, 133, 129, 125],
            *(90, '{"id":0,"tags":[]}]'),
        ),
    ],
)
def test_recorded_looks_and_end(
    schema: Any, prefix: str, repeat: str, limit: int, looks: list[int], tokens_left: int, path: str
) -> None:
    """Tokens left at the looks that are more than one apart, and where the answer is bound."""
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    state = grammars.start({"json_schema": schema}, [TOK.bos], TOK.encode(prefix), limit)
    ending, count = state.closing, len(prefix)
    assert ending is not None
    look_points: list[int] = []
    while ending.path is None:
        look = limit - count - 1 - ending.free
        if ending.free and look not in look_points:
            look_points.append(look)
        state.feed(TOK.encode(repeat[(count - len(prefix)) % len(repeat)]))
        count += 1
    assert (limit - count, TOK.decode(ending.path)) == (tokens_left, path)
    assert look_points == looks
    assert ending.free == 0


def test_far_from_the_limit_no_end_is_sought() -> None:
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    state = grammars.start({"json_schema": {"type": "string"}}, [TOK.bos], [], 1000)
    assert state.closing is not None
    assert state.closing.free == 1000 - 512 - 1


def test_without_an_end_the_next_look_is_halfway() -> None:
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    schema = {"json_schema": {"type": "string", "minLength": 200}}
    ending = grammars.start(schema, [TOK.bos], [], 100).closing
    assert ending is not None
    assert (ending.path, ending.free) == (None, 100 - 50 - 1)


@pytest.mark.parametrize(("limit", "path"), [(2, None), (3, '"'), (4, '"'), (9, '"'), (10, None)])
def test_the_end_and_its_stop_token_must_fit(limit: int, path: str | None) -> None:
    """One token is there already; from 7 on behind the path and the stop token, it may go on."""
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    schema = {"json_schema": {"type": "string"}}
    ending = grammars.start(schema, [TOK.bos], TOK.encode('"'), limit).closing
    assert ending is not None
    assert (None if ending.path is None else TOK.decode(ending.path)) == path


@pytest.mark.parametrize(
    ("text", "inside", "is_escaped"),
    [
        ("", False, False),
        ('{"a', True, False),
        ('{"a"', False, False),
        ('"\\', True, True),
        ('"\\"', True, False),
        ('"\\\\"', False, False),
        ("\\", False, False),
        ('\\"', True, False),
    ],
)
def test_quotes_and_escapes(text: str, inside: bool, is_escaped: bool) -> None:
    assert Quotes().after(text.encode()) == Quotes(inside, is_escaped)


def test_tokens_that_close_soonest_come_first() -> None:
    tokens_ = [b"}", b"]", b",", b'"', b"7", b":", b"[", b"{", b"-", b"#", b"", b'"}', b"a", b"\\"]
    ranks = Preferences(tokens_)
    by_rank = [tokens_[i] for i in ranks.outside.argsort(kind="stable")]
    assert by_rank == [
        *(b"}", b"]", b",", b'"}', b'"', b"7", b":", b"[", b"{"),
        *(b"#", b"a", b"\\", b"-", b""),
    ]
    assert ranks.inside.argsort(kind="stable")[:2].tolist() == [11, 3]
    assert ranks.inside[12] == 0.99  # a letter, after the quote
    assert ranks.comma == 2
    assert Preferences([b"x"]).comma is None
