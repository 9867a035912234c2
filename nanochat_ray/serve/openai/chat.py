"""``/v1/chat/completions``: request to generation request, deltas to response or chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from nanochat_ray.serve.generation import Delta, GenerationRequest, LogprobPair
from nanochat_ray.serve.openai import errors, logprobs
from nanochat_ray.serve.openai.builder import ChoiceState, ResponseBuilder, calculations
from nanochat_ray.serve.openai.schema.outputs import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    ToolCallDelta,
)
from nanochat_ray.serve.openai.schema.requests import ChatRequest
from nanochat_ray.serve.serving import THREAD_CHARACTERS, Prompt, Serving, readable
from nanochat_ray.text.chat import content_text, from_openai, render_prompt, tool_delimiters


async def chat_prompt(serving: Serving, body: ChatRequest, paths: Sequence[str] = ()) -> list[int]:
    """Token ids of a conversation. ApiError names the message that is wrong, by its path if the
    messages have ``paths`` in the request that was sent."""
    messages = body.messages
    if len(messages) >= serving.max_model_len:  # every message has two tokens or more
        raise errors.invalid(
            f"This model's longest sequence is {serving.max_model_len} tokens, but there are "
            f"{len(messages)} messages.",
            "messages",
            "context_length_exceeded",
        )
    choice = body.effective_tool_choice
    tools = body.tools if choice.mode != "none" else None
    try:
        for i, message in enumerate(messages):
            if message.role == "function":
                raise ValueError(
                    f"messages[{i}].role='function' is not supported: use tools and 'tool'"
                )
        turns = from_openai(
            [m.model_dump(exclude_none=True) for m in messages],
            [t.model_dump(exclude_none=True) for t in tools or ()],
            paths=paths,
        )
        if len(str(turns)) > THREAD_CHARACTERS:
            ids = await asyncio.to_thread(_render, serving, turns, body)
        else:
            ids = _render(serving, turns, body)
    except ValueError as error:
        raise errors.invalid_field(error, default="messages") from None
    if choice.is_forced:
        ids.append(tool_delimiters(serving.tokenizer).call_start)
    return ids


def _render(serving: Serving, turns: list[dict[str, Any]], body: ChatRequest) -> list[int]:
    return render_prompt(
        serving.tokenizer,
        turns,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
    )


async def parse_chat(
    serving: Serving, body: ChatRequest, client: str = "", paths: Sequence[str] = ()
) -> GenerationRequest:
    """``paths``: see ``chat_prompt``."""
    serving.check_model(body.model)
    ids = await chat_prompt(serving, body, paths)
    serving.check_choices(body, 1)
    max_tokens = body.max_completion_tokens or body.max_tokens
    last, echo = body.messages[-1], ""
    if body.echo and last.role == "assistant":
        content = last.model_dump(exclude_none=True).get("content")
        echo = readable(content_text(content, "content"))
    prompt = Prompt(ids, serving.answer_tokens(ids, "messages", max_tokens), echo)
    return serving.generation_request(body, [prompt], client, logprobs=bool(body.logprobs))


class ChatBuilder(ResponseBuilder):
    object_name = "chat.completion.chunk"

    def _logprobs(self, tokens: list[LogprobPair]) -> ChatLogprobs | None:
        if not self.generation.logprobs:
            return None
        return logprobs.for_chat(self.serving.tokenizer, tokens)

    def opening(self) -> str:
        deltas: list[tuple[int, ChatDelta]] = [
            (i, {"role": "assistant", "content": ""}) for i in range(len(self.choices))
        ]
        echoes = enumerate(self.generation.prefixes)
        deltas += [(i, {"content": echo}) for i, echo in echoes if echo]
        fields: dict[str, Any] = {}
        if self.generation.return_token_ids:
            fields["prompt_token_ids"] = list(self.generation.requests[0].prompt)
        first = self._chunk(*deltas[0], None, None, fields=fields)
        return first + "".join(self._chunk(i, delta, None, None) for i, delta in deltas[1:])

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        logprobs: ChatLogprobs | None,
        finish_reason: Any,
        token_ids: list[int] | None = None,
        fields: dict[str, Any] | None = None,
    ) -> str:
        choice: ChatChunkChoice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if token_ids is not None:
            choice["token_ids"] = token_ids
        return self.chunk(choice, fields)

    def chunks(self, delta: Delta) -> str:
        content: ChatDelta = {}
        if delta.tool_results:
            content["calculator"] = calculations(delta)
        if delta.text:
            content["content"] = delta.text
        if delta.tool_calls:
            content["tool_calls"] = [self._tool_call(delta)]
        scores = self._logprobs(delta.logprobs)
        token_ids = delta.token_ids if self.generation.return_token_ids else None
        return self._chunk(delta.index, content, scores, delta.finish_reason, token_ids)

    def _tool_call(self, delta: Delta) -> ToolCallDelta:
        call = self.choices[delta.index].call
        arguments = "".join(part.arguments for part in delta.tool_calls)
        name = delta.tool_calls[0].name
        if name is None or call is None:
            return {"index": 0, "function": {"arguments": arguments}}
        return {
            "index": 0,
            "id": call["id"],
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def response(self) -> ChatCompletionResponse:
        result: ChatCompletionResponse = {
            "id": self.id,
            "object": "chat.completion",
            "created": self.timestamp,
            "model": self.serving.name,
            "choices": [self._choice(index, i) for index, i in enumerate(self.ranking())],
            "usage": self.usage(),
            "system_fingerprint": self.system_fingerprint,
        }
        if self.generation.return_token_ids:
            result["prompt_token_ids"] = list(self.generation.requests[0].prompt)
        return result

    def _choice(self, index: int, i: int) -> ChatChoice:
        choice = self.choices[i]
        result: ChatChoice = {
            "index": index,
            "message": _message(choice),
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }
        if self.generation.return_token_ids:
            result["token_ids"] = choice.token_ids
        return result


def _message(choice: ChoiceState) -> AnswerMessage:
    message: AnswerMessage = {
        "role": "assistant",
        "content": (choice.text or None) if choice.call else choice.text,
        "refusal": None,
    }
    if choice.call:
        message["tool_calls"] = [choice.call]
    if choice.calculations:
        message["calculator"] = choice.calculations
    return message
