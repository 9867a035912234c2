"""What an answer must fit: OpenAI's ``response_format`` and vLLM's ``structured_outputs``."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator

from nanochat_ray.engine.request import Grammar
from nanochat_ray.serve.conversation import Body

ANY_OBJECT = Grammar(kind="json", source='{"type": "object"}')


class JsonSchema(Body):
    name: StrictStr | None = None
    definition: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format.json_schema belongs to the type 'json_schema'")
        return self

    def grammar(self) -> Grammar | None:
        if self.json_schema is not None:
            return Grammar(kind="json", source=json.dumps(self.json_schema.definition))
        return ANY_OBJECT if self.type == "json_object" else None


class StructuredOutputs(Body):
    """Exactly one of these."""

    json_: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: list[StrictStr] | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if (
            sum(x is not None for x in (self.json_, self.regex, self.choice))
            + bool(self.json_object)
            != 1
        ):
            raise ValueError("structured_outputs needs one of json, json_object, regex, choice")
        return self

    def grammar(self) -> Grammar:
        if self.json_ is not None:
            given = self.json_
            return Grammar(
                kind="json", source=given if isinstance(given, str) else json.dumps(given)
            )
        if self.regex is not None:
            return Grammar(kind="regex", source=self.regex)
        if self.choice is not None:
            return Grammar(kind="choice", source=json.dumps(self.choice))
        return ANY_OBJECT


def grammar_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Grammar | None:
    """ValueError if both ask for something, or for what no grammar can be made of."""
    asked = response_format.grammar() if response_format is not None else None
    if structured is None:
        return asked
    if asked is not None:
        raise ValueError("structured_outputs is not allowed together with response_format")
    return structured.grammar()
