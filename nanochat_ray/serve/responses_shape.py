"""How an answer looks in ``/v1/responses``: one object of output items, or its events.

Event names and fields are those of OpenAI's API reference ("Responses: streaming events").
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from nanochat_ray.serve import logprobs
from nanochat_ray.serve.errors import ApiError
from nanochat_ray.serve.generation import Delta, GenerationRequest, LogprobPair
from nanochat_ray.serve.responses_request import ResponsesRequest
from nanochat_ray.serve.service import Service
from nanochat_ray.serve.shapes import Shape

Item = dict[str, Any]


class ResponsesShape(Shape):
    kind = "response"

    def __init__(self, service: Service, job: GenerationRequest, request: ResponsesRequest):
        self._request = request
        self._sequence = 0
        self._message_id = f"msg_{secrets.token_hex(12)}"
        self._message_open = False
        self._call_items: list[Item] = []
        self._call_begun = False
        super().__init__(service, job, f"resp_{secrets.token_hex(12)}")

    def take(self, piece: Delta) -> None:
        super().take(piece)
        call = self.calls[0]
        if call is None:
            return
        if not self._call_items:
            identity = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call"}
            self._call_items = [{**identity, "call_id": call.id, "name": call.function.name}]
        status = "in_progress" if piece.finish_reason is None else self._status()
        self._call_items[0] |= {"status": status, "arguments": call.function.arguments}

    # --- the whole ------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        text = bool(self.text[0]) or not self._call_items
        message = [self._message(self._status())] if text else []
        return self._response(self._status(), [*message, *self._call_items])

    def _status(self) -> str:
        return "incomplete" if self.finish[0] == "length" else "completed"

    def _scores(self, scored: list[LogprobPair]) -> list[dict[str, Any]]:
        if not self.job.logprobs:
            return []
        return logprobs.for_chat(self.service.tokenizer, scored)["content"]

    def _part(self) -> Item:
        return {
            "type": "output_text",
            "text": self.text[0],
            "annotations": [],
            "logprobs": self._scores(self.scored[0]),
        }

    def _message(self, status: str) -> Item:
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [] if status == "in_progress" else [self._part()],
        }

    def _response(self, status: str, output: list[Item], error: Any = None) -> dict[str, Any]:
        request = self._request
        ended = status in ("completed", "incomplete")
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": self.kind,
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": details,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self.service.name,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": request.truncation or "disabled",
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }

    # --- events ---------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> str:
        name = f"response.{kind}"
        data = {"type": name, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return f"event: {name}\ndata: {json.dumps(data)}\n\n"

    def frame(self, events: list[str]) -> str:
        return "".join(events)

    def opening(self) -> list[str]:
        started = self._response("in_progress", [])
        return [self._event(kind, response=started) for kind in ("created", "in_progress")]

    def deltas(self, piece: Delta) -> list[str]:
        at = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        events: list[str] = []
        nothing = piece.finish_reason is not None and not self._call_items
        if not self._message_open and (piece.text or nothing):
            self._message_open = True
            item, part = self._message("in_progress"), {**self._part(), "text": "", "logprobs": []}
            events.append(self._event("output_item.added", output_index=0, item=item))
            events.append(self._event("content_part.added", **at, part=part))
        if piece.text:
            scores = self._scores(piece.logprobs)
            delta = self._event("output_text.delta", **at, delta=piece.text, logprobs=scores)
            events.append(delta)
        if piece.tool_calls and not self._message_open:  # else behind the end of the message
            events += self._call_delta("".join(part.arguments for part in piece.tool_calls))
        return events if piece.finish_reason is None else events + self._ending(at)

    def _call_delta(self, arguments: str) -> list[str]:
        (item,) = self._call_items
        index = int(self._message_open)
        events = []
        if not self._call_begun:
            self._call_begun = True
            begun = {**item, "status": "in_progress", "arguments": ""}
            events.append(self._event("output_item.added", output_index=index, item=begun))
        if arguments:
            at = {"item_id": item["id"], "output_index": index}
            events.append(self._event("function_call_arguments.delta", **at, delta=arguments))
        return events

    def _ending(self, at: Item) -> list[str]:
        events: list[str] = []
        if self._message_open:
            part, item = self._part(), self._message(self._status())
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            events.append(self._event("output_text.done", **at, **done))
            events.append(self._event("content_part.done", **at, part=part))
            events.append(self._event("output_item.done", output_index=0, item=item))
        for index, item in enumerate(self._call_items, start=int(self._message_open)):
            if not self._call_begun:
                events += self._call_delta(item["arguments"])
            done = {"item_id": item["id"], "output_index": index, "name": item["name"]}
            written = item["arguments"]
            events += [
                self._event("function_call_arguments.done", **done, arguments=written),
                self._event("output_item.done", output_index=index, item=item),
            ]
        return events

    def closing(self, include_usage: bool) -> str:
        return self._event(self._status(), response=self.whole())

    def failure(self, error: ApiError) -> str:
        reason = {"code": error.code or "server_error", "message": error.message}
        response = self._response("failed", [], reason)
        return self._event("failed", response=response)
