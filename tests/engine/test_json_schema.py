"""Schemas are closed and bounded, and whatever fits the result fits the schema that was sent."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from nanochat_ray.engine import json_schema
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.engine.json_schema import MAX_ITEMS, MAX_NUMBER, MAX_STRING, bound_schema
from nanochat_ray.text.tokenizer import Tokenizer
from tests.engine.engine_kit import ask, finish, make_engine, make_model, tokens

TOK = Tokenizer.bytes_only()
USER = {
    "$defs": {"Pet": {"type": "object", "properties": {"name": {"type": "string"}}}},
    "type": "object",
    "properties": {
        "name": {"title": "Name", "type": "string"},
        "age": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}},
    },
    "required": ["name"],
}
BASE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MORE = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
EXACT = {"type": "object", "properties": {"b": True}, "additionalProperties": {"type": "null"}}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOK.byte_table(), TOK.vocab_size)


def accepts(grammars: Grammars, schema: Any, text: str) -> bool:
    state = grammars.start({"json_schema": schema}, ())
    return state.feed(text.encode()) and state.matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "fits", "does_not"),
    [
        (USER, '{"name":"x","age":3,"pets":[{"name":"y"}]}', '{"name":"x","other":1}'),
        (USER, '{"name":"x"}', '{"name":"x","pets":[{"name":"y","z":1}]}'),
        ({"type": "integer"}, str(MAX_NUMBER // 10), "1" * 20),
        ({"type": "integer"}, "-12", "-" + "1" * 20),
        ({"type": "integer", "minimum": 10**17}, str(10**17 + 1), "1"),
        ({"type": "integer", "minimum": 0}, "0", "1" * 20),
        ({"type": "integer", "exclusiveMaximum": 10}, "9", "-" + "1" * 20),
        ({"type": "number"}, "3.125", "0." + "1" * 30),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0.5", "0." + "1" * 30),
        ({"type": ["string", "null"]}, "null", f'"{"x" * (MAX_STRING + 1)}"'),
        ({"type": "string"}, f'"{"é" * MAX_STRING}"', f'"{"x" * (MAX_STRING + 1)}"'),
        ({"type": "string", "maxLength": 300}, f'"{"x" * 300}"', f'"{"x" * 301}"'),
        ({"type": "string", "minLength": 300}, f'"{"x" * 300}"', f'"{"x" * 301}"'),
        ({"type": "string", "pattern": "^a{400}$"}, f'"{"a" * 400}"', '"a"'),
        ({"type": "array", "items": {"type": "null"}}, "[null]", json.dumps([None] * 65)),
        ({"type": "array"}, '[1,"a",[{}]]', json.dumps([1] * (MAX_ITEMS + 1))),
        ({"type": "object"}, '{"a":{"b":[1,"x"]}}', f'{{"{"k" * 65}":1}}'),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            '{"a":1,"b":2}',
            '{"a":"x"}',
        ),
        ({"type": "object", "additionalProperties": False}, "{}", '{"a":1}'),
        ({"properties": {"a": {}}, "type": "object"}, '{"a":[{"b":1}]}', f'{{"a":{"1" * 30}}}'),
        ({**BASE, "additionalProperties": True}, '{"a":1,"other":[]}', '{"other":1}'),
        (EXACT, '{"b":1,"other":null}', '{"other":1}'),
        # What several lists of properties describe is not closed by one of them.
        ({"allOf": [BASE, MORE]}, '{"a":1,"b":2}', '{"a":1}'),
        (
            {"allOf": [{"$ref": "#/$defs/B"}, MORE], "$defs": {"B": BASE}},
            '{"a":1,"b":2}',
            '{"b":1}',
        ),
        ({"allOf": [{"$ref": "#/$defs/B"}], "$defs": {"B": BASE}}, '{"a":1}', '{"a":1,"b":2}'),
        ({"anyOf": [BASE, MORE]}, '{"b":1}', '{"b":1,"c":2}'),
        (
            {"type": "array", "prefixItems": [{"$ref": "#/$defs/B"}], "$defs": {"B": BASE}},
            '[{"a":1}]',
            '[{"a":1,"b":2}]',
        ),
        (
            {"type": "object", "properties": {"n": {"$ref": "#"}}},
            '{"n":{"n":{}}}',
            '{"n":{"m":1}}',
        ),
    ],
)
def test_schemas_are_closed_and_bounded(
    grammars: Grammars, schema: Any, fits: str, does_not: str
) -> None:
    jsonschema.validate(json.loads(fits), schema)
    assert accepts(grammars, schema, fits)
    assert not accepts(grammars, schema, does_not)


def test_contradicted_bounds_are_dropped(grammars: Grammars) -> None:
    # No multiple of a billionth lies between.
    tiny = {"type": "number", "exclusiveMinimum": 0, "maximum": 5e-10}
    assert accepts(grammars, {"enum": [10**17]}, str(10**17))
    grammars.check({"json_schema": {"type": "number", "const": 1e-12}})
    grammars.check({"json_schema": tiny})


@pytest.mark.parametrize(("least", "most"), [(0, MAX_ITEMS), (MAX_ITEMS + 9, MAX_ITEMS + 9)])
def test_lists_may_have_the_items_they_need(least: int, most: int) -> None:
    assert bound_schema({"type": "array", "minItems": least})["maxItems"] == most


def test_bound_schema_leaves_its_input_unchanged() -> None:
    before = json.dumps(USER)
    bound_schema(USER)
    assert json.dumps(USER) == before
    for odd in (True, {"type": 5}, {"properties": []}, {"allOf": {}}, {"$defs": 3}, {"items": 1}):
        bound_schema(odd)  # type: ignore[arg-type]


def test_hostile_schemas_are_bounded_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = 0
    visit = json_schema._Closing.inside

    def accepts_count(*values: Any) -> bool:
        nonlocal visits
        visits += 1
        return visit(*values)

    monkeypatch.setattr(json_schema._Closing, "inside", accepts_count)
    links = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, BASE]} for i in range(1000)}
    chain = {"allOf": [{"$ref": "#/$defs/d0"}, BASE], "$defs": {**links, "d1000": MORE}}
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(100):
        deep = {"anyOf": [deep, {"type": "null"}]}
    for schema, nodes in ((chain, 3002), (deep, 201)):
        visits = 0
        bound_schema(schema)
        assert visits <= nodes * 4 * (json_schema.MAX_ROUNDS + 1)
    assert "additionalProperties" not in bound_schema(chain)["$defs"]["d1000"]
    loop: Any = {"type": "null"}
    for _ in range(json_schema.MAX_DEPTH + 2):
        loop = {"anyOf": [loop]}
    with pytest.raises(ValueError, match="nested deeper than 128"):
        bound_schema(loop)


def babbling(**fields: Any) -> Engine:
    return make_engine(
        make_model("modern", sequence_len=2048), token_bytes=TOK.byte_table(), **fields
    )


@pytest.mark.slow
def test_weak_model_outputs_are_valid_json() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "height": {"type": "number"},
        },
        "required": ["name", "age", "height"],
    }
    engine = babbling(max_num_seqs=8)
    for seed in range(8):
        engine.add(
            ask(
                str(seed),
                [1],
                grammar={"json_schema": schema},
                temperature=[0.0, 0.7, 1.5, 2.0][seed % 4],
                seed=seed,
                max_tokens=4 * MAX_STRING + 100,
                eos_ids=(TOK.bos,),
            )
        )
    for outputs in finish(engine).values():
        assert outputs[-1].finish == "stop"
        ids = tokens(outputs)
        value = json.loads(TOK.decode(ids[:-1] if outputs[-1].last_token_is_stop else ids))
        jsonschema.validate(value, {**schema, "additionalProperties": False})


def test_bounds_are_no_less_than_the_least() -> None:
    assert bound_schema({"type": "array", "minItems": 100})["maxItems"] == 100
    assert bound_schema({"type": "string", "minLength": 300})["maxLength"] == 300


def test_objects_in_each_place_of_a_tuple_are_closed() -> None:
    pet = {"type": "object", "properties": {"name": {"type": "string"}}}
    for key in ("prefixItems", "items"):
        (first,) = bound_schema({"type": "array", key: [pet]})[key]
        assert first["additionalProperties"] is False
        # Also by a reference, which an open place would leave open.
        schema = {"$defs": {"Pet": pet}, "type": "array", key: [{"$ref": "#/$defs/Pet"}]}
        assert bound_schema(schema)["$defs"]["Pet"]["additionalProperties"] is False
