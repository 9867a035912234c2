"""OpenAI's responses, whole; ``shapes`` fills them, and writes the chunks of streams."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, model_serializer

from nanochat_ray.serve.generation import FinishReason


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    """Found in the prefix cache."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: FinishReason | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    """vLLM's."""


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: None = None


class Calculation(BaseModel):
    """One use of the calculator inside an answer; an addition of ours, which clients ignore."""

    expression: str
    result: str


class CalledFunction(BaseModel):
    name: str
    arguments: str
    """JSON, as the model wrote it."""


class CalledTool(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[CalledTool] | None = None
    calculator: list[Calculation] | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, dump: Any) -> dict[str, Any]:
        absent = [name for name in ("tool_calls", "calculator") if not getattr(self, name)]
        return {k: v for k, v in dump(self).items() if k not in absent}


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: FinishReason | None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nanochat_ray"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class VersionResponse(BaseModel):
    version: str


class DetokenizeResponse(BaseModel):
    prompt: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody
