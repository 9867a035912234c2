"""The answer of ``/v1/responses``: one object of output items, or the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any, Literal

from nanochat_ray.serve.generation import Delta, GenerationRequest, LogprobPair
from nanochat_ray.serve.openai import logprobs
from nanochat_ray.serve.openai.builder import ResponseBuilder
from nanochat_ray.serve.openai.errors import ApiError
from nanochat_ray.serve.openai.schema.outputs import TokenLogprob
from nanochat_ray.serve.responses.schema import (
    FunctionCallItem,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponsesError,
    ResponsesRequest,
    ResponsesResponse,
    ResponsesUsage,
)
from nanochat_ray.serve.serving import Serving
from nanochat_ray.serve.sse import event


class ResponsesBuilder(ResponseBuilder):
    object_name = "response"

    def __init__(self, serving: Serving, generation: GenerationRequest, body: ResponsesRequest):
        self._message_id = f"msg_{secrets.token_hex(12)}"
        super().__init__(serving, generation, f"resp_{secrets.token_hex(12)}")
        self._body = body
        self._num_events = 0
        self._has_message = self._has_call = False
        """Of a stream: whether the item has been added."""
        self._call: FunctionCallItem | None = None

    def add(self, delta: Delta) -> None:
        super().add(delta)
        call = self.choices[0].call
        if call is None:
            return
        item_id = self._call["id"] if self._call else f"fc_{secrets.token_hex(12)}"
        self._call = {
            "id": item_id,
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "status": "in_progress" if delta.finish_reason is None else self._final_status(),
            "arguments": call["function"]["arguments"],
        }

    def _final_status(self) -> Literal["incomplete", "completed"]:
        return "incomplete" if self.choices[0].finish_reason == "length" else "completed"

    def _logprobs(self, tokens: list[LogprobPair]) -> list[TokenLogprob]:
        if not self.generation.logprobs:
            return []
        return logprobs.for_chat(self.serving.tokenizer, tokens)["content"]

    def _part(self) -> OutputText:
        choice = self.choices[0]
        scores = self._logprobs(choice.logprobs)
        return {
            "type": "output_text",
            "text": choice.text,
            "annotations": [],
            "logprobs": scores,
        }

    def _message(self, status: Literal["in_progress", "incomplete", "completed"]) -> OutputMessage:
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [] if status == "in_progress" else [self._part()],
        }

    def response(self) -> ResponsesResponse:
        status = self._final_status()
        output: list[OutputItem] = []
        if self.choices[0].text or self._call is None:
            output.append(self._message(status))
        if self._call is not None:
            output.append(self._call)
        return self._response(status, output)

    def _response(
        self,
        status: Literal["in_progress", "completed", "incomplete", "failed"],
        output: list[OutputItem],
        error: ResponsesError | None = None,
    ) -> ResponsesResponse:
        body = self._body
        text_format, choice = body.text and body.text.format, body.tool_choice or "auto"
        has_ended = status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.timestamp,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.serving.name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": text_format.echo() if text_format else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.echo(),
            "tools": [tool.echo() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": self._usage() if has_ended else None,
        }

    def _usage(self) -> ResponsesUsage:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    # --- events ---------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> str:
        name = f"response.{kind}"
        data = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {name}\n{event(json.dumps(data))}"

    def opening(self) -> str:
        response = self._response("in_progress", [])
        return "".join(self._event(kind, response=response) for kind in ("created", "in_progress"))

    def chunks(self, delta: Delta) -> str:
        at = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        events = ""
        is_empty = delta.finish_reason is not None and self._call is None
        if not self._has_message and (delta.text or is_empty):
            self._has_message = True
            item, part = self._message("in_progress"), {**self._part(), "text": "", "logprobs": []}
            events += self._event("output_item.added", output_index=0, item=item)
            events += self._event("content_part.added", **at, part=part)
        if delta.text:
            scores = self._logprobs(delta.logprobs)
            events += self._event("output_text.delta", **at, delta=delta.text, logprobs=scores)
        if delta.tool_calls and self._call and not self._has_message:  # else after the message
            arguments = "".join(part.arguments for part in delta.tool_calls)
            events += self._call_delta(self._call, arguments)
        return events if delta.finish_reason is None else events + self._ending(at)

    def _call_delta(self, call: FunctionCallItem, arguments: str) -> str:
        index, events = int(self._has_message), ""
        if not self._has_call:
            self._has_call = True
            item = {**call, "status": "in_progress", "arguments": ""}
            events += self._event("output_item.added", output_index=index, item=item)
        if arguments:
            at = {"item_id": call["id"], "output_index": index}
            events += self._event("function_call_arguments.delta", **at, delta=arguments)
        return events

    def _ending(self, at: dict[str, Any]) -> str:
        events = ""
        if self._has_message:
            part, item = self._part(), self._message(self._final_status())
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events += self._event("output_text.done", **at, **text)
            events += self._event("content_part.done", **at, part=part)
            events += self._event("output_item.done", output_index=0, item=item)
        if (call := self._call) is not None:
            if not self._has_call:
                events += self._call_delta(call, call["arguments"])
            index = int(self._has_message)
            at = {"item_id": call["id"], "output_index": index, "name": call["name"]}
            events += self._event("function_call_arguments.done", **at, arguments=call["arguments"])
            events += self._event("output_item.done", output_index=index, item=call)
        return events

    def closing(self) -> str:
        return self._event(self._final_status(), response=self.response())

    def failure(self, error: ApiError) -> str:
        reason: ResponsesError = {
            "code": error.code or "server_error",
            "message": error.message,
        }
        return self._event("failed", response=self._response("failed", [], reason))
