"""``/v1/responses``: its request, its response, and the events of a stream.

Names and fields are those of OpenAI's API reference ("Responses", "Streaming events").
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictStr, model_validator
from typing_extensions import TypedDict

from nanochat_ray.serve.body import Body, doc
from nanochat_ray.serve.openai.schema.outputs import (
    Count,
    ModelName,
    Timestamp,
    TokenLogprob,
    about,
)
from nanochat_ray.serve.openai.schema.requests import (
    MaxTokens,
    NumLogprobs,
    Salt,
    Seed,
    Temperature,
    TopP,
)
from nanochat_ray.serve.openai.tools import FunctionSpec

_STORED = "nothing is stored here, so send the whole conversation as input"
NOT_SUPPORTED: dict[str, str] = {
    "background": "the answer is not kept for later",
    "conversation": _STORED,
    "previous_response_id": _STORED,
    "prompt": "there are no prompt templates",
}


class TextPart(Body):
    type: Literal["input_text", "output_text", "text", "refusal"] = Field(
        description="Kind of part."
    )
    text: StrictStr | None = doc("The text.")
    refusal: StrictStr | None = doc("The text of the type refusal.")


class InputItem(Body):
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = doc(
        "Kind of item; reasoning is ignored.", "message"
    )
    role: Literal["user", "assistant", "system", "developer"] | None = doc("Author of a message.")
    content: StrictStr | list[TextPart] | None = doc("Text of a message, or its parts.")
    call_id: StrictStr | None = doc("Identifier of the call, of a function_call or its output.")
    name: StrictStr | None = doc("Name of the function, of a function_call.")
    arguments: StrictStr | None = doc("Arguments of a function_call, a JSON object as text.")
    output: StrictStr | list[TextPart] | None = doc("Result of a call, or its parts.")


class _EchoedBody(Body):
    """Part of a request that the response repeats, with fields that are ignored."""

    model_config = ConfigDict(extra="allow")

    def echo(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True, by_alias=True)


class _FunctionKind(_EchoedBody):
    type: Literal["function"] = Field(description="Kind of tool.")


class FunctionTool(FunctionSpec, _FunctionKind):
    """Its type is validated first: tools of other types have other fields."""


class FunctionChoice(_FunctionKind):
    name: StrictStr = Field(description="Name of the function to call.")


class AllowedChoice(_EchoedBody):
    type: Literal["allowed_tools"] = Field(description="Some of the tools.")
    mode: Literal["auto", "required"] = Field(description="Whether one of them must be called.")
    tools: Annotated[list[FunctionChoice], Field(min_length=1)] = Field(description="Which.")


class TextFormat(_EchoedBody):
    type: Literal["text", "json_object", "json_schema"] = Field(description="Form of the answer.")
    name: StrictStr | None = doc("Name of the schema; it changes nothing.")
    definition: dict[str, Any] | None = doc(
        "The JSON schema, for the type json_schema.", alias="schema"
    )

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.definition is None:
            raise ValueError("schema is missing: the type json_schema needs one")
        if self.type == "text" and self.definition is not None:
            raise ValueError("schema is not allowed with the type 'text'")
        return self


class TextOptions(Body):
    format: TextFormat | None = doc("By default text.")


class ResponsesRequest(Body):
    model: StrictStr | None = doc("Name of the model; by default the one of this server.")
    input: StrictStr | Annotated[list[InputItem], Field(min_length=1)] = Field(
        description="A text, or items: messages, function calls, and their outputs."
    )
    instructions: StrictStr | None = doc("A system message before the input.")
    tools: list[FunctionTool] | None = doc("Functions that the model may call.")
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedChoice | None = doc(
        "Whether the model may call (auto), must call (required, or a name), or must not (none); "
        "or which of the tools it may or must call."
    )
    parallel_tool_calls: StrictBool | None = doc("No effect: an answer has one call at most.")
    text: TextOptions | None = doc("The form of the answer.")
    max_output_tokens: MaxTokens | None = doc("Most tokens of the answer.")
    temperature: Temperature | None = doc("Divides the logits; 0 is greedy. By default 1.")
    top_p: TopP | None = doc("Sample from the likeliest tokens that reach this probability.")
    top_logprobs: NumLogprobs | None = doc("Log-probabilities of this many likeliest tokens.")
    include: Annotated[list[Any], Field(max_length=16)] | None = doc(
        "message.output_text.logprobs adds log-probabilities."
    )
    truncation: Literal["auto", "disabled"] | None = doc("auto drops turns that do not fit.")
    metadata: Annotated[dict[str, StrictStr], Field(max_length=16)] | None = doc(
        "Repeated in the response."
    )
    stream: StrictBool | None = doc("Whether events are sent as the answer is generated.")
    seed: Seed | None = doc("vLLM's: equal seeds give equal answers.")
    cache_salt: Salt | None = doc("vLLM's: only equal salts share a prefix cache.")

    @model_validator(mode="before")
    @classmethod
    def _check_support(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for name, reason in NOT_SUPPORTED.items():
                if body.get(name) not in (None, False):
                    raise ValueError(f"{name} is not supported: {reason}")
        return body


Status = Annotated[
    Literal["in_progress", "completed", "incomplete", "failed"],
    about("Incomplete if the answer was cut at max_output_tokens."),
]
ItemId = Annotated[str, about("Identifier of the output item.")]
OutputIndex = Annotated[Count, about("Position of the output item.")]
Logprobs = Annotated[list[TokenLogprob], about("Log-probabilities of the tokens.")]


class OutputText(TypedDict):
    type: Annotated[Literal["output_text"], about("Kind of this part.")]
    text: Annotated[str, about("The text.")]
    annotations: Annotated[list[Any], about("Always empty.")]
    logprobs: Logprobs


class OutputMessage(TypedDict):
    id: ItemId
    type: Annotated[Literal["message"], about("Kind of this item.")]
    status: Status
    role: Annotated[Literal["assistant"], about("Author of the message.")]
    content: Annotated[list[OutputText], about("One part, none while in progress.")]


class FunctionCallItem(TypedDict):
    id: ItemId
    type: Annotated[Literal["function_call"], about("Kind of this item.")]
    call_id: Annotated[str, about("Identifier, which the function's output refers to.")]
    name: Annotated[str, about("Name of the function.")]
    status: Status
    arguments: Annotated[str, about("Arguments as JSON, as the model wrote them.")]


OutputItem = OutputMessage | FunctionCallItem


class InputTokensDetails(TypedDict):
    cached_tokens: Annotated[Count, about("Input tokens from the prefix cache.")]


class OutputTokensDetails(TypedDict):
    reasoning_tokens: Annotated[Count, about("Always 0.")]


class ResponsesUsage(TypedDict):
    input_tokens: Annotated[Count, about("Tokens of the prompt.")]
    input_tokens_details: Annotated[InputTokensDetails, about("Where they came from.")]
    output_tokens: Annotated[Count, about("Tokens of the answer.")]
    output_tokens_details: Annotated[OutputTokensDetails, about("What they are.")]
    total_tokens: Annotated[Count, about("Sum of both.")]


class IncompleteDetails(TypedDict):
    reason: Annotated[Literal["max_output_tokens"], about("Why the answer is incomplete.")]


class ResponsesError(TypedDict):
    code: Annotated[str, about("A code for programs.")]
    message: Annotated[str, about("What went wrong, in words.")]


class ResponsesResponse(TypedDict):
    id: Annotated[str, about("Identifier of the answer.")]
    object: Annotated[Literal["response"], about("Kind of this object.")]
    created_at: Timestamp
    completed_at: Annotated[Count | None, about("Seconds since the epoch.")]
    status: Status
    background: Annotated[Literal[False], about("Always false.")]
    error: Annotated[ResponsesError | None, about("Why the answer failed.")]
    incomplete_details: Annotated[IncompleteDetails | None, about("Why it is incomplete.")]
    instructions: Annotated[str | None, about("As in the request.")]
    max_output_tokens: Annotated[MaxTokens | None, about("As in the request.")]
    metadata: Annotated[dict[str, str], about("As in the request.")]
    model: ModelName
    output: Annotated[list[OutputItem], about("A message, a function call, or both.")]
    parallel_tool_calls: Annotated[bool, about("As in the request; by default true.")]
    previous_response_id: Annotated[None, about("Always null.")]
    store: Annotated[Literal[False], about("Always false: nothing is stored.")]
    temperature: Annotated[Temperature, about("As in the request; by default 1.")]
    text: Annotated[dict[str, Any], about("As in the request.")]
    tool_choice: Annotated[str | dict[str, Any], about("As in the request; by default auto.")]
    tools: Annotated[list[Any], about("As in the request.")]
    top_logprobs: Annotated[NumLogprobs, about("As in the request; by default 0.")]
    top_p: Annotated[TopP, about("As in the request; by default 1.")]
    truncation: Annotated[Literal["auto", "disabled"], about("As in the request.")]
    usage: Annotated[ResponsesUsage | None, about("Token counts, once it has ended.")]


# --- events -------------------------------------------------------------------------------------


class Event(TypedDict):
    sequence_number: Annotated[Count, about("Position of the event in the stream.")]


class ResponseEvent(Event):
    type: Annotated[
        Literal[
            "response.created",
            "response.in_progress",
            "response.completed",
            "response.incomplete",
            "response.failed",
        ],
        about("The stream begins with the first two and ends with one of the others."),
    ]
    response: Annotated[ResponsesResponse, about("The answer so far.")]


class ItemEvent(Event):
    type: Annotated[
        Literal["response.output_item.added", "response.output_item.done"],
        about("An output item begins or ends."),
    ]
    output_index: OutputIndex
    item: Annotated[OutputItem, about("The item so far.")]


class _ItemPosition(Event):
    item_id: ItemId
    output_index: OutputIndex


class _TextPosition(_ItemPosition):
    content_index: Annotated[Count, about("Position of the part in the item; always 0.")]


class PartEvent(_TextPosition):
    type: Annotated[
        Literal["response.content_part.added", "response.content_part.done"],
        about("A part of a message begins or ends."),
    ]
    part: Annotated[OutputText, about("The part so far.")]


class TextDeltaEvent(_TextPosition):
    type: Annotated[Literal["response.output_text.delta"], about("New text.")]
    delta: Annotated[str, about("The new text.")]
    logprobs: Logprobs


class TextDoneEvent(_TextPosition):
    type: Annotated[Literal["response.output_text.done"], about("The text is complete.")]
    text: Annotated[str, about("The whole text.")]
    logprobs: Logprobs


class ArgumentsDeltaEvent(_ItemPosition):
    type: Annotated[Literal["response.function_call_arguments.delta"], about("New arguments.")]
    delta: Annotated[str, about("Further text of the arguments.")]


class ArgumentsDoneEvent(_ItemPosition):
    type: Annotated[Literal["response.function_call_arguments.done"], about("All arguments.")]
    name: Annotated[str, about("Name of the function.")]
    arguments: Annotated[str, about("The arguments as JSON.")]


ResponsesEvent = (
    ResponseEvent
    | ItemEvent
    | PartEvent
    | TextDeltaEvent
    | TextDoneEvent
    | ArgumentsDeltaEvent
    | ArgumentsDoneEvent
)
