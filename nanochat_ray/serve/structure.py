"""What an answer must fit: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and older
``guided_…``, llama.cpp's ``grammar`` and ``json_schema``."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, StrictBool, StrictStr, model_validator

from nanochat_ray.engine.request import check_grammar
from nanochat_ray.serve.conversation import Body

Grammar = dict[str, Any]
"""The engine's form: one kind with its value (``SamplingParams.grammar``)."""
ANY_OBJECT: Grammar = {"json_object": True}


def schema_of(field: str, given: dict[str, Any] | str) -> Any:
    """A schema that may be sent as text. ValueError if that is no JSON."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        raise ValueError(f"{field}={given!r:.80} is not allowed: a JSON schema") from None


class JsonSchema(Body):
    name: StrictStr | None = None
    definition: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema")
    """llama.cpp's, also for the type json_object."""

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
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
    """Exactly one of these."""

    json_: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    json_object: StrictBool | None = None
    regex: StrictStr | None = None
    choice: list[StrictStr] | None = None
    grammar_: StrictStr | None = Field(default=None, alias="grammar")
    """Lark, or llama.cpp's GBNF."""
    structural_tag: Any = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
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
            return {"json_schema": schema_of("structured_outputs.json", self.json_)}
        if self.regex is not None:
            return {"regex": self.regex}
        if self.choice is not None:
            return {"choice": self.choice}
        if self.grammar_ is not None:
            return {"lark": self.grammar_}
        return ANY_OBJECT


class Structured(Body):
    """Every field by which a request may ask for a grammar; one of them, at most."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | StrictStr | None = None
    guided_regex: StrictStr | None = None
    guided_choice: list[StrictStr] | None = None
    guided_grammar: StrictStr | None = None
    grammar_: StrictStr | None = Field(default=None, alias="grammar")
    """llama.cpp's: GBNF. Lark is taken too."""
    json_schema: dict[str, Any] | StrictStr | None = None
    """llama.cpp's."""

    @property
    def grammar(self) -> Grammar | None:
        """The engine's form. ValueError if two fields ask, or for what is no grammar."""
        asked: dict[str, Grammar] = {}
        if self.response_format is not None and (format_ := self.response_format.grammar()):
            asked["response_format"] = format_
        if self.structured_outputs is not None:
            asked["structured_outputs"] = self.structured_outputs.grammar()
        for name in ("guided_json", "json_schema"):
            if (given := getattr(self, name)) is not None:
                asked[name] = {"json_schema": schema_of(name, given)}
        for name, kind, given in (
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "lark", self.guided_grammar),
            ("grammar", "lark", self.grammar_ or None),  # llama.cpp's clients send an empty one
        ):
            if given is not None:
                asked[name] = {kind: given}
        if len(asked) > 1:
            first, second, *_ = asked
            raise ValueError(f"{second} is not allowed together with {first}")
        grammar = next(iter(asked.values()), None)
        check_grammar(grammar)
        return grammar
