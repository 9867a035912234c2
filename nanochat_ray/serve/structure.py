"""What an answer must fit: OpenAI's ``response_format`` and vLLM's ``structured_outputs``."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator

from nanochat_ray.engine.request import check_grammar
from nanochat_ray.serve.conversation import Body

Grammar = dict[str, Any]
"""The engine's form: one kind with its value (``SamplingParams.grammar``)."""
ANY_OBJECT: Grammar = {"json_object": True}


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
            return {"json_schema": self.json_schema.definition}
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

    @staticmethod
    def _schema(given: dict[str, Any] | str) -> Any:
        try:
            return json.loads(given) if isinstance(given, str) else given
        except ValueError:
            raise ValueError(f"structured_outputs.json={given!r} is not JSON") from None

    def grammar(self) -> Grammar:
        if self.json_ is not None:
            return {"json_schema": self._schema(self.json_)}
        if self.regex is not None:
            return {"regex": self.regex}
        if self.choice is not None:
            return {"choice": self.choice}
        return ANY_OBJECT


def grammar_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Grammar | None:
    """ValueError if both ask for something, or for what no grammar can be made of."""
    asked = response_format.grammar() if response_format is not None else None
    if structured is not None:
        if asked is not None:
            raise ValueError("structured_outputs is not allowed together with response_format")
        asked = structured.grammar()
    check_grammar(asked)
    return asked
