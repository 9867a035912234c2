"""A ``/v1/responses`` request as the job of the chat that it stands for."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from nanochat_ray.serve import errors
from nanochat_ray.serve.errors import ApiError
from nanochat_ray.serve.generation import GenerationRequest
from nanochat_ray.serve.protocol import ChatRequest
from nanochat_ray.serve.responses_request import ResponsesRequest, turn_starts
from nanochat_ray.serve.service import Service

_OUR_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "messages": "input",
}


async def responses_job(service: Service, body: ResponsesRequest, client: str) -> GenerationRequest:
    """With ``truncation="auto"`` the oldest turns that do not fit are left out. ApiError names the
    fields of the request that was sent."""
    try:
        fields = body.chat()
        try:
            return await service.chat_job(ChatRequest(**fields), client)
        except ApiError as error:
            if error.code != "context_length_exceeded" or body.truncation != "auto":
                raise
            return await _truncated(service, fields, client, error)
    except ApiError as error:
        raise _renamed(error) from None
    except ValidationError as error:
        raise _renamed(errors.from_validation(_in_body(error))) from None
    except ValueError as error:
        name = re.match(r"[\w.\[\]]*", str(error))
        raise errors.invalid(str(error), name and name[0]) from None


async def _truncated(
    service: Service, fields: dict[str, Any], client: str, failure: ApiError
) -> GenerationRequest:
    """The job with as many of the newest turns as fit; ``failure`` if not even the last does."""
    messages = fields["messages"]
    system, starts = turn_starts(messages)
    fit: GenerationRequest | None = None
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        rest = [*messages[:system], *messages[starts[middle] :]]
        try:
            fit = await service.chat_job(ChatRequest(**fields | {"messages": rest}), client)
            high = middle
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
    if fit is None:
        raise failure
    return fit


def _in_body(error: ValidationError) -> list[Any]:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return [{**details[0], "loc": ("body", *details[0]["loc"])}]


def _renamed(error: ApiError) -> ApiError:
    for chat, ours in _OUR_NAMES.items():
        error.message = error.message.replace(chat, ours)
        error.param = error.param and error.param.replace(chat, ours)
    return error
