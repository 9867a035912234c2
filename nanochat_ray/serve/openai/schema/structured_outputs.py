"""Fields that constrain an answer: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and
older ``guided_…``, llama.cpp's ``grammar`` and ``json_schema``."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator

from nanochat_ray.serve.body import Body, doc

Grammar = dict[str, Any]
"""The engine's form: one kind with its value (``SamplingParams.grammar``)."""
Schema = dict[str, Any] | StrictStr
ANY_OBJECT: Grammar = {"json_object": True}


def _json_schema(field: str, schema: dict[str, Any] | str) -> Grammar:
    """A schema that may be JSON text. ValueError if the text is not JSON."""
    try:
        return {"json_schema": json.loads(schema) if isinstance(schema, str) else schema}
    except (ValueError, RecursionError):
        raise ValueError(f"{field}={schema!r:.80} is not allowed: a JSON schema") from None


class JsonSchema(Body):
    name: StrictStr | None = doc("Name of the schema; it changes nothing.")
    definition: dict[str, Any] = Field(alias="schema", description="The JSON schema.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = Field(description="Form of the answer.")
    json_schema: JsonSchema | None = doc("The schema, for the type json_schema.")
    definition: dict[str, Any] | None = doc(
        "llama.cpp's: the schema, for the type json_object too.", alias="schema"
    )

    @model_validator(mode="after")
    def _check_schemas(self) -> ResponseFormat:
        schemas = (self.json_schema is not None) + (self.definition is not None)
        if self.json_schema is not None and self.type != "json_schema":
            raise ValueError("response_format.json_schema belongs to the type 'json_schema'")
        if schemas > 1 or (self.type == "json_schema" and not schemas):
            raise ValueError("response_format needs one of json_schema and schema")
        if self.type == "text" and schemas:
            raise ValueError("response_format.schema is not allowed with the type 'text'")
        return self

    def grammar(self) -> Grammar | None:
        if self.definition:
            return {"json_schema": self.definition}
        if self.json_schema is not None:
            return {"json_schema": self.json_schema.definition}
        return ANY_OBJECT if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's: exactly one of these fields."""

    json_: Schema | None = doc("A JSON schema.", alias="json")
    json_object: StrictBool | None = doc("Any JSON object.")
    regex: StrictStr | None = doc("A regular expression.")
    choice: list[StrictStr] | None = doc("One of these texts.")
    grammar_: StrictStr | None = doc("A grammar in Lark or in llama.cpp's GBNF.", alias="grammar")
    structural_tag: Any = doc("Not supported.")

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        if self.structural_tag is not None:
            raise ValueError("structured_outputs.structural_tag is not supported")
        kinds = (self.json_, self.regex, self.choice, self.grammar_)
        if sum(x is not None for x in kinds) + bool(self.json_object) != 1:
            raise ValueError(
                "structured_outputs needs one of json, json_object, regex, choice, grammar"
            )
        return self

    def grammar(self) -> Grammar:
        if self.json_ is not None:
            return _json_schema("structured_outputs.json", self.json_)
        values = {"regex": self.regex, "choice": self.choice, "lark": self.grammar_}
        return next(({kind: x} for kind, x in values.items() if x is not None), ANY_OBJECT)


class ConstrainedBody(Body):
    """All fields that constrain an answer; a request may have one of them."""

    response_format: ResponseFormat | None = doc("OpenAI's: text, a JSON object, or a schema.")
    structured_outputs: StructuredOutputs | None = doc("vLLM's.")
    guided_json: Schema | None = doc("vLLM's older name of structured_outputs.json.")
    guided_regex: StrictStr | None = doc("vLLM's older name of structured_outputs.regex.")
    guided_choice: list[StrictStr] | None = doc("vLLM's older name of structured_outputs.choice.")
    guided_grammar: StrictStr | None = doc("vLLM's older name of structured_outputs.grammar.")
    grammar_: StrictStr | None = doc("llama.cpp's: a grammar in GBNF or Lark.", alias="grammar")
    json_schema: Schema | None = doc("llama.cpp's: a JSON schema.")

    @property
    def grammar(self) -> Grammar | None:
        """The engine's form. ValueError if two fields constrain the answer."""
        return self._constraint[1]

    @property
    def grammar_field(self) -> str:
        """The field that ``grammar`` comes from; "" if there is none."""
        return self._constraint[0]

    @cached_property
    def _constraint(self) -> tuple[str, Grammar | None]:
        grammars: dict[str, Grammar] = {}
        if self.response_format is not None and (format_ := self.response_format.grammar()):
            grammars["response_format"] = format_
        if self.structured_outputs is not None:
            grammars["structured_outputs"] = self.structured_outputs.grammar()
        for name in ("guided_json", "json_schema"):
            if (schema := getattr(self, name)) is not None:
                grammars[name] = _json_schema(name, schema)
        for name, kind, value in (
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "lark", self.guided_grammar),
            ("grammar", "lark", self.grammar_ or None),  # llama.cpp's clients send an empty one
        ):
            if value is not None:
                grammars[name] = {kind: value}
        if len(grammars) > 1:
            first, second, *_ = grammars
            raise ValueError(f"{second} is not allowed together with {first}")
        return next(iter(grammars.items()), ("", None))
