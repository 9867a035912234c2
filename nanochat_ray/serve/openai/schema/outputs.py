"""Responses and stream chunks, as typed dictionaries: the server builds them, so they are checked
statically and in the tests, and cost nothing when they are sent."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from nanochat_ray.serve.generation import FinishReason

Count = Annotated[int, Field(ge=0)]
Logprob = Annotated[float, Field(le=0)]
Byte = Annotated[int, Field(ge=0, le=255)]


def about(description: str) -> Any:
    return Field(description=description)


Id = Annotated[str, about("Identifier of the answer.")]
Timestamp = Annotated[Count, about("Seconds since the epoch.")]
ModelName = Annotated[str, about("Name of the model.")]
Index = Annotated[Count, about("Position of the choice.")]
Finish = Annotated[
    FinishReason | None, about("Why the choice ended; null in all chunks before the last.")
]
Fingerprint = Annotated[
    str | None, about("Names the weights that answer: checkpoint and digest, as x-checkpoint.")
]


class PromptTokensDetails(TypedDict):
    cached_tokens: Annotated[Count, about("Prompt tokens from the prefix cache.")]


class Usage(TypedDict):
    prompt_tokens: Annotated[Count, about("Tokens of all prompts.")]
    completion_tokens: Annotated[Count, about("Tokens of all choices.")]
    total_tokens: Annotated[Count, about("Sum of both.")]
    prompt_tokens_details: Annotated[PromptTokensDetails, about("Where prompt tokens came from.")]


ChunkUsage = Annotated[
    Usage | None, about("With include_usage: null before the last chunk, or the counts so far.")
]


class Answer(TypedDict):
    id: Id
    created: Timestamp
    model: ModelName
    system_fingerprint: Fingerprint


# --- completions --------------------------------------------------------------------------------


class CompletionLogprobs(TypedDict):
    tokens: Annotated[list[str], about("Text of each token.")]
    token_logprobs: Annotated[
        list[Logprob | None], about("Log-probability of each token; null for the first one.")
    ]
    top_logprobs: Annotated[
        list[dict[str, Logprob] | None], about("Log-probabilities of the likeliest tokens.")
    ]
    text_offset: Annotated[list[Count], about("Where each token begins, in characters.")]


class PromptLogprob(TypedDict):
    logprob: Annotated[Logprob, about("Log-probability.")]
    rank: Annotated[
        Annotated[int, Field(ge=1)] | None, about("Position by likelihood; null if unknown.")
    ]
    decoded_token: Annotated[str, about("Text of the token.")]


TokenIdList = Annotated[
    list[Count],
    about("vLLM's, with return_token_ids: the tokens of the text, special ones and tools' too."),
]
PromptTokenIds = Annotated[
    list[Count],
    about("vLLM's, with return_token_ids: the tokens of the prompt; in a stream, the first time."),
]


class CompletionChunkChoice(TypedDict):
    index: Index
    text: Annotated[str, about("Text; in a chunk, the new text.")]
    logprobs: Annotated[CompletionLogprobs | None, about("Log-probabilities of the tokens.")]
    finish_reason: Finish
    token_ids: NotRequired[TokenIdList]
    prompt_token_ids: NotRequired[PromptTokenIds]


class CompletionChoice(CompletionChunkChoice):
    prompt_logprobs: Annotated[
        list[dict[str, PromptLogprob] | None] | None,
        about("vLLM's: log-probabilities of each prompt token, by token id."),
    ]


class CompletionResponse(Answer):
    object: Annotated[Literal["text_completion"], about("Kind of this object.")]
    choices: Annotated[list[CompletionChoice], about("n choices for each prompt, in order.")]
    usage: Annotated[Usage, about("Token counts.")]


class CompletionChunk(Answer):
    object: Annotated[Literal["text_completion"], about("Kind of this object.")]
    choices: Annotated[list[CompletionChunkChoice], about("One choice; none with the usage.")]
    usage: NotRequired[ChunkUsage]


# --- chat ---------------------------------------------------------------------------------------


class TopLogprob(TypedDict):
    token: Annotated[str, about("Text of the token.")]
    logprob: Annotated[Logprob, about("Log-probability.")]
    bytes: Annotated[list[Byte], about("Bytes of the token: it may be part of a character.")]


class TokenLogprob(TopLogprob):
    top_logprobs: Annotated[list[TopLogprob], about("The likeliest tokens at this position.")]


class ChatLogprobs(TypedDict):
    content: Annotated[list[TokenLogprob], about("One entry for each token of the text.")]
    refusal: Annotated[None, about("Always null.")]


class Calculation(TypedDict):
    """An extension of this server: one use of the calculator inside an answer."""

    expression: Annotated[str, about("What the model asked for.")]
    result: Annotated[str, about("What the engine inserted.")]


class FunctionCall(TypedDict):
    name: Annotated[str, about("Name of the function.")]
    arguments: Annotated[str, about("Arguments as JSON, as the model wrote them.")]


class AnswerToolCall(TypedDict):
    id: Annotated[str, about("Identifier, which the result refers to.")]
    type: Annotated[Literal["function"], about("Kind of tool.")]
    function: Annotated[FunctionCall, about("The function to execute.")]


class AnswerMessage(TypedDict):
    role: Annotated[Literal["assistant"], about("Author of the message.")]
    content: Annotated[str | None, about("Text; null if there is only a call.")]
    refusal: Annotated[None, about("Always null.")]
    tool_calls: NotRequired[Annotated[list[AnswerToolCall], about("Calls to execute.")]]
    calculator: NotRequired[Annotated[list[Calculation], about("Uses of the calculator.")]]


class ChatChoice(TypedDict):
    index: Index
    message: Annotated[AnswerMessage, about("The answer.")]
    logprobs: Annotated[ChatLogprobs | None, about("Log-probabilities of the tokens.")]
    finish_reason: Finish
    token_ids: NotRequired[TokenIdList]


class ChatCompletionResponse(Answer):
    object: Annotated[Literal["chat.completion"], about("Kind of this object.")]
    choices: Annotated[list[ChatChoice], about("n choices.")]
    usage: Annotated[Usage, about("Token counts.")]
    prompt_token_ids: NotRequired[PromptTokenIds]


class FunctionCallDelta(TypedDict):
    name: NotRequired[Annotated[str, about("Name of the function, in the first chunk.")]]
    arguments: Annotated[str, about("Further text of the arguments.")]


class ToolCallDelta(TypedDict):
    index: Annotated[Count, about("Position of the call; always 0.")]
    id: NotRequired[Annotated[str, about("Identifier, in the first chunk.")]]
    type: NotRequired[Annotated[Literal["function"], about("Kind of tool, in the first chunk.")]]
    function: Annotated[FunctionCallDelta, about("Parts of the call.")]


class ChatDelta(TypedDict):
    role: NotRequired[Annotated[Literal["assistant"], about("In the first chunk of a choice.")]]
    content: NotRequired[Annotated[str, about("New text.")]]
    tool_calls: NotRequired[Annotated[list[ToolCallDelta], about("New parts of a call.")]]
    calculator: NotRequired[Annotated[list[Calculation], about("New uses of the calculator.")]]


class ChatChunkChoice(TypedDict):
    index: Index
    delta: Annotated[ChatDelta, about("What this chunk adds.")]
    logprobs: Annotated[ChatLogprobs | None, about("Log-probabilities of the new tokens.")]
    finish_reason: Finish
    token_ids: NotRequired[TokenIdList]


class ChatCompletionChunk(Answer):
    object: Annotated[Literal["chat.completion.chunk"], about("Kind of this object.")]
    choices: Annotated[list[ChatChunkChoice], about("One choice; none with the usage.")]
    usage: NotRequired[ChunkUsage]
    prompt_token_ids: NotRequired[PromptTokenIds]


# --- everything else ----------------------------------------------------------------------------


class ModelCard(TypedDict):
    id: ModelName
    object: Annotated[Literal["model"], about("Kind of this object.")]
    created: Timestamp
    owned_by: Annotated[str, about("Owner of the model.")]
    max_model_len: Annotated[Count, about("vLLM's: longest prompt plus answer, in tokens.")]
    checkpoint: Annotated[str | None, about("The weights that a new request gets.")]


class ModelList(TypedDict):
    object: Annotated[Literal["list"], about("Kind of this object.")]
    data: Annotated[list[ModelCard], about("The models of this server: one.")]


class TokenizeResponse(TypedDict):
    count: Annotated[Count, about("Number of tokens.")]
    max_model_len: Annotated[Count, about("Longest prompt plus answer, in tokens.")]
    tokens: Annotated[list[Count], about("Token ids.")]
    token_strs: NotRequired[Annotated[list[str], about("The text of each token.")]]


class DetokenizeResponse(TypedDict):
    prompt: Annotated[str, about("The text of the tokens.")]


class TokenizerInfo(TypedDict):
    tokenizer_class: Annotated[str, about("transformers' class of the exported tokenizer.")]
    bos_token: Annotated[str, about("The token that every document begins with.")]
    eos_token: Annotated[str, about("The token that ends an answer.")]
    model_max_length: Annotated[Count, about("Longest prompt plus answer, in tokens.")]


class VersionResponse(TypedDict):
    version: Annotated[str, about("Version of nanochat_ray.")]


class HealthResponse(TypedDict):
    status: Annotated[Literal["ok"], about("The server can generate; 503 otherwise.")]
    model: ModelName
    engines: Annotated[list[dict[str, Any]], about("Statistics of each engine.")]
    follow: NotRequired[
        Annotated[dict[str, Any], about("With --follow: what is served, and what is refused.")]
    ]


class ErrorObject(TypedDict):
    message: Annotated[str, about("What is wrong, in words.")]
    type: Annotated[str, about("invalid_request_error, rate_limit_error, server_error, …")]
    param: Annotated[str | None, about("The field of the request that is wrong.")]
    code: Annotated[str | None, about("A code for programs, such as context_length_exceeded.")]


class ErrorResponse(TypedDict):
    error: Annotated[ErrorObject, about("The failure.")]
