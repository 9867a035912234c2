"""JSON schemas as outputs follow them: closed, and bounded where the schema has no bound.

A weak model may generate digits, characters or items up to its token limit, and then its JSON is
invalid. So everything that a schema leaves unbounded gets a bound that real outputs keep within.
Objects that list properties are closed unless the schema opens them, as in vLLM: pydantic,
instructor and others send them that way. Every output that fits the result fits the schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MAX_STRING = 256
"""Characters of a string."""
MAX_NUMBER = 2**53 - 1
"""Numbers up to this are exact in every JSON reader."""
FRACTION = 1e-9
"""Numbers are multiples of it."""
MAX_ITEMS = 64
MAX_KEY = 64
"""Characters of a name that the schema does not list."""
MAX_LEVELS = 8
"""Of a value that a schema does not describe."""
MAX_DEPTH = 128
"""Schemas within schemas."""
MAX_ROUNDS = 8
"""Length of a chain of references between definitions that is followed."""

_ANY = "nanochat-ray-any-"
_ANNOTATIONS = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
        *("$comment", "$schema", "$id", "$defs", "definitions"),
    )
)
_BRANCHES = ("allOf", "anyOf", "oneOf")
_ALTERNATIVES = ("if", "then", "else")
_VALUES = ("items", "additionalProperties", "unevaluatedProperties", "contains", "not")
_NAMED = ("properties", "patternProperties", "dependentSchemas")
_DEFINITIONS = ("$defs", "definitions")


def bound_schema(schema: Mapping[str, Any] | bool) -> Any:
    """A schema that allows part of what ``schema`` does. ValueError if it is nested too deep."""
    closing = _Closing(schema)
    bounds = _Bounds(closing)
    result = bounds.of(schema, 0)
    if bounds.any_used:
        own = result.get("$defs")
        result["$defs"] = {**(own if isinstance(own, Mapping) else {}), **_any_values()}
    return result


def json_object() -> dict[str, Any]:
    """The schema of any JSON object."""
    return bound_schema({"type": "object"})


def _any_values() -> dict[str, Any]:
    """Definitions of any value, by the number of remaining levels."""
    scalars = ["null", "boolean", "integer", "number", "string"]
    simple: list[Any] = [{"type": "null"}, {"type": "boolean"}]
    simple += [_bound_scalar({"type": kind}, {kind}) for kind in scalars[2:]]
    definitions: dict[str, Any] = {f"{_ANY}0": {"anyOf": simple}}
    for level in range(1, MAX_LEVELS + 1):
        inner = {"$ref": f"#/$defs/{_ANY}{level - 1}"}
        containers = [{"type": "array", "items": inner, "maxItems": MAX_ITEMS}, _open_object(inner)]
        definitions[f"{_ANY}{level}"] = {"anyOf": [*simple, *containers]}
    return definitions


def _open_object(value: Any) -> dict[str, Any]:
    names = {f"^.{{0,{MAX_KEY}}}$": value}
    return {"type": "object", "patternProperties": names, "additionalProperties": False}


def _types(schema: Mapping[str, Any]) -> set[str]:
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return {kind for kind in kinds if isinstance(kind, str)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bound_scalar(schema: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
    if "string" in kinds and not schema.keys() & {"maxLength", "pattern"}:
        least = schema.get("minLength", 0)
        schema["maxLength"] = max(MAX_STRING, least) if _number(least) else MAX_STRING
    if kinds & {"integer", "number"}:
        least = [schema[k] for k in ("minimum", "exclusiveMinimum") if _number(schema.get(k))]
        most = [schema[k] for k in ("maximum", "exclusiveMaximum") if _number(schema.get(k))]
        if not most and all(value < MAX_NUMBER for value in least):
            schema["maximum"] = MAX_NUMBER
        if not least and all(value > -MAX_NUMBER for value in most):
            schema["minimum"] = -MAX_NUMBER
    if "number" in kinds:
        schema.setdefault("multipleOf", FRACTION)
    return schema


def _in_place(schema: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Groups of schemas that the same value has to fit beside ``schema``'s own properties."""
    for key in _BRANCHES:
        branches = schema.get(key)
        if isinstance(branches, list):
            # All of ``allOf`` hold together, only one of the others.
            yield from [[branch] for branch in branches] if key == "allOf" else [branches]
    if alternatives := [schema[key] for key in _ALTERNATIVES if key in schema]:
        yield alternatives


class _Closing:
    """Which objects are closed: those whose properties are all listed in one place. Where a value
    has to fit several lists of properties, closing one would forbid what the others ask for."""

    def __init__(self, schema: Any):
        self.open_references: set[str] = set()
        self._lists: dict[int, bool] = {}
        for _ in range(MAX_ROUNDS):
            before = len(self.open_references)
            self._collect(schema, True, 0)
            if before == len(self.open_references):
                return
        self.open_references.add("#")  # a long chain of them: then no definition is closed

    def _collect(self, schema: Any, may_close: bool, depth: int) -> None:
        if not isinstance(schema, Mapping):
            return
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        if not self.inside(schema, may_close) and isinstance(schema.get("$ref"), str):
            self.open_references.add(schema["$ref"])
        for child, closes in self.children(schema, may_close):
            self._collect(child, closes, depth + 1)

    def _lists_properties(self, schema: Any) -> bool:
        if not isinstance(schema, Mapping):
            return False
        if "properties" in schema or "$ref" in schema:
            return True
        if id(schema) not in self._lists:  # else nested ones are walked again at every level
            self._lists[id(schema)] = any(
                self._lists_properties(child) for group in _in_place(schema) for child in group
            )
        return self._lists[id(schema)]

    def inside(self, schema: Mapping[str, Any], may_close: bool) -> bool:
        """Whether what stands in place inside ``schema`` may be closed."""
        groups = sum(any(map(self._lists_properties, group)) for group in _in_place(schema))
        return may_close and groups + ("properties" in schema) + ("$ref" in schema) <= 1

    def children(self, schema: Mapping[str, Any], may_close: bool) -> Iterator[tuple[Any, bool]]:
        inside = self.inside(schema, may_close)
        for group in _in_place(schema):
            yield from ((child, inside) for child in group)
        for key in _VALUES:
            if key in schema:
                yield schema[key], key != "not"
        for key in ("prefixItems", "items"):
            if isinstance(schema.get(key), list):
                yield from ((child, True) for child in schema[key])
        for key in _NAMED:
            if isinstance(schema.get(key), Mapping):
                yield from ((child, key != "dependentSchemas") for child in schema[key].values())
        for key in _DEFINITIONS:
            if isinstance(schema.get(key), Mapping):
                for name, child in schema[key].items():
                    yield child, self.definition(key, name)

    def definition(self, key: str, name: str) -> bool:
        """Whether a definition may be closed."""
        references = self.open_references
        own = f"#/{key}/{name}"
        # Any other form of reference may mean any place.
        return own not in references and all(
            r.startswith(("#/$defs/", "#/definitions/")) and r.count("/") == 2 for r in references
        )


class _Bounds:
    def __init__(self, closing: _Closing):
        self._closing = closing
        self.any_used = False

    def any_value(self) -> dict[str, Any]:
        self.any_used = True
        return {"$ref": f"#/$defs/{_ANY}{MAX_LEVELS}"}

    def of(self, schema: Any, depth: int, may_close: bool = True, value: bool = True) -> Any:
        """``schema`` bounded; ``value``: it is all that is said of a value."""
        if schema is True and value and depth:
            return self.any_value()
        if not isinstance(schema, Mapping):
            return schema
        if value and not schema.keys() - _ANNOTATIONS:
            names = ("title", "description", *_DEFINITIONS)
            return {**{k: schema[k] for k in names if k in schema}, **self.any_value()}
        result = self._children(schema, depth, may_close)
        kinds = _types(schema)
        if schema.keys() & {"enum", "const"}:
            return result
        _bound_scalar(result, kinds)
        if "array" in kinds and "prefixItems" not in schema:
            result.setdefault("items", self.any_value() if "items" not in schema else True)
            least = schema.get("minItems", 0)
            most = max(MAX_ITEMS, least) if _number(least) else MAX_ITEMS
            result.setdefault("maxItems", most)
        self._bound_object(schema, result, kinds, may_close)
        return result

    def _bound_object(
        self, schema: Mapping[str, Any], result: dict[str, Any], kinds: set[str], may_close: bool
    ) -> None:
        others = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
        if "properties" in schema:
            if not schema.keys() & others and self._closing.inside(schema, may_close):
                result["additionalProperties"] = False
        elif "object" in kinds and not schema.keys() & (
            {"patternProperties", "unevaluatedProperties", "propertyNames", "required", "$ref"}
            | set(_BRANCHES)
            | set(_ALTERNATIVES)
        ):
            values = result.get("additionalProperties", True)
            if values is not False:
                values = self.any_value() if values is True else values
                result.update(_open_object(values) | {"type": schema["type"]})

    def _children(self, schema: Mapping[str, Any], depth: int, may_close: bool) -> dict[str, Any]:
        inside = self._closing.inside(schema, may_close)
        result: dict[str, Any] = {}
        for key, value in schema.items():
            if key in _BRANCHES and isinstance(value, list):
                whole = key != "allOf" and not _types(schema) and "properties" not in schema
                result[key] = [self.of(child, depth + 1, inside, whole) for child in value]
            elif key in _ALTERNATIVES:
                result[key] = value if key == "if" else self.of(value, depth + 1, inside, False)
            elif key in ("items", "prefixItems") and isinstance(value, list):
                result[key] = [self.of(child, depth + 1) for child in value]
            elif key in ("items", "additionalProperties"):
                result[key] = self.of(value, depth + 1)
            elif key in ("properties", "patternProperties") and isinstance(value, Mapping):
                result[key] = {name: self.of(child, depth + 1) for name, child in value.items()}
            elif key in _DEFINITIONS and isinstance(value, Mapping):
                result[key] = {
                    name: self.of(child, depth + 1, self._closing.definition(key, name))
                    for name, child in value.items()
                }
            else:
                result[key] = value
        return result
