"""How answers look in OpenAI's protocol: whole, or in chunks as they come."""

from __future__ import annotations

import json
import math
import secrets
import time
from dataclasses import dataclass
from typing import Any

from nanochat_ray.engine.detokenizer import ToolResultEvent
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.serve import logprobs
from nanochat_ray.serve.errors import ApiError
from nanochat_ray.serve.generation import Delta, GenerationRequest, LogprobPair
from nanochat_ray.serve.logprobs import TextOffsets
from nanochat_ray.serve.responses import (
    AnswerMessage,
    Calculation,
    CalledFunction,
    CalledTool,
    ChatChoice,
    ChatResponse,
    CompletionChoice,
    CompletionResponse,
    PromptTokensDetails,
    Usage,
)
from nanochat_ray.serve.service import Service
from nanochat_ray.serve.sse import DONE, event


def _calculation(event: ToolResultEvent) -> Calculation:
    return Calculation(expression=event.call, result=event.result)


@dataclass
class Shape:
    """How one kind of answer looks. Choices gather here while it runs."""

    service: Service
    job: GenerationRequest
    id: str
    kind = ""

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.text = list(self.job.prefixes)
        self.calculations: list[list[Calculation]] = [[] for _ in self.job.requests]
        self.calls: list[CalledTool | None] = [None] * len(self.job.requests)
        self.scored: list[list[LogprobPair]] = [[] for _ in self.job.requests]
        self.prompt_scores: list[list[TokenLogprob | None]] = [[] for _ in self.job.requests]
        self.finish: list[Any] = [None] * len(self.job.requests)
        self.tokens = 0
        self.cached = [0] * len(self.job.requests)
        # All of a chunk that never changes is written once: it is most of each event.
        head = {"id": self.id, "object": self.kind, "created": self.created}
        self._head = json.dumps({**head, "model": self.service.name})[:-1] + ', "choices": ['
        self._tail = '], "usage": null}' if self.job.include_usage else "]}"

    def take(self, piece: Delta) -> None:
        self.tokens += piece.num_tokens
        self.cached[piece.index] += piece.cached_tokens
        self.text[piece.index] += piece.text
        self.calculations[piece.index] += map(_calculation, piece.tool_results)
        for delta in piece.tool_calls:
            call = self.calls[piece.index]
            if call is None:
                function = CalledFunction(name=delta.name or "", arguments="")
                call = CalledTool(id=f"call_{secrets.token_hex(12)}", function=function)
                self.calls[piece.index] = call
            call.function.arguments += delta.arguments
        self.finish[piece.index] = piece.finish_reason
        self.scored[piece.index] += piece.logprobs
        self.prompt_scores[piece.index] += piece.prompt_logprobs

    def shown(self) -> list[int]:
        """The choices that the client gets: with ``best_of`` the likeliest, by log-probability
        per token as at OpenAI."""
        job = self.job
        if job.candidates == job.n:
            return list(range(len(job.requests)))

        def likelihood(i: int) -> float:
            scored = self.scored[i]
            return sum(s.logprob for _, s in scored) / len(scored) if scored else -math.inf

        firsts = range(0, len(job.requests), job.candidates)
        return [
            i
            for first in firsts
            for i in sorted(range(first, first + job.candidates), key=likelihood, reverse=True)[
                : job.n
            ]
        ]

    def usage(self) -> Usage:
        prompt = self.job.prompt_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.tokens,
            total_tokens=prompt + self.tokens,
            # A prompt counts once, however many choices share it.
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(self.cached[:: self.job.candidates])
            ),
        )

    def chunk(self, choice: dict[str, Any]) -> str:
        return self._head + json.dumps(choice) + self._tail

    def usage_chunk(self) -> str:
        return f'{self._head}], "usage": {self.usage().model_dump_json()}}}'

    def opening(self) -> list[str]:
        raise NotImplementedError

    def delta(self, piece: Delta) -> str:
        raise NotImplementedError

    def deltas(self, piece: Delta) -> list[str]:
        return [self.delta(piece)]

    def frame(self, events: list[str]) -> str:
        """Events as they are sent."""
        return event(*events)

    def closing(self, include_usage: bool) -> str:
        return event(self.usage_chunk(), DONE) if include_usage else event(DONE)

    def failure(self, error: ApiError) -> str:
        return event(json.dumps(error.body()))

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError


class CompletionShape(Shape):
    kind = "text_completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        # Of streams: each choice's tokens so far.
        self._offsets = [self._text_offsets(i) for i in range(len(self.job.requests))]

    def _text_offsets(self, index: int) -> TextOffsets:
        hidden = self.job.hidden if self.job.prefixes[index] else 0
        return TextOffsets(self.service.tokenizer, hidden)

    def _logprobs(self, piece: Delta, offsets: TextOffsets) -> dict[str, Any] | None:
        if not self.job.logprobs:
            return None
        prompt = self._prompt(piece) if self.job.prefixes[piece.index] else []
        return logprobs.for_completion(self.service.tokenizer, [*prompt, *piece.logprobs], offsets)

    def _prompt(self, piece: Delta) -> list[tuple[int, TokenLogprob | None]]:
        ids = self.job.requests[piece.index].prompt
        return list(zip(ids, piece.prompt_logprobs, strict=True)) if piece.prompt_logprobs else []

    def opening(self) -> list[str]:
        if self.job.logprobs and any(self.job.prefixes):
            return []  # the echo comes with its scores, in the first piece
        return [self.delta(Delta(i, text)) for i, text in enumerate(self.job.prefixes) if text]

    def delta(self, piece: Delta) -> str:
        prefix = self.job.prefixes[piece.index]
        echoed = bool(prefix and piece.prompt_logprobs and self.job.logprobs)
        return self.chunk(
            {
                "index": piece.index,
                "text": prefix + piece.text if echoed else piece.text,
                "logprobs": self._logprobs(piece, self._offsets[piece.index])
                if piece.num_tokens or echoed
                else None,
                "finish_reason": piece.finish_reason,
            }
        )

    def whole(self) -> dict[str, Any]:
        return CompletionResponse(
            id=self.id,
            created=self.created,
            model=self.service.name,
            choices=[self._choice(index, i) for index, i in enumerate(self.shown())],
            usage=self.usage(),
        ).model_dump()

    def _choice(self, index: int, i: int) -> CompletionChoice:
        piece = Delta(i, logprobs=self.scored[i], prompt_logprobs=self.prompt_scores[i])
        shown = self.job.prompt_logprobs
        tokenizer = self.service.tokenizer
        return CompletionChoice(
            index=index,
            text=self.text[i],
            logprobs=self._logprobs(piece, self._text_offsets(i)),
            finish_reason=self.finish[i],
            prompt_logprobs=None
            if shown is None
            else logprobs.for_prompt(tokenizer, self._prompt(piece), shown),
        )


class ChatShape(Shape):
    kind = "chat.completion.chunk"

    def _logprobs(self, scored: list[LogprobPair]) -> dict[str, Any] | None:
        return logprobs.for_chat(self.service.tokenizer, scored) if self.job.logprobs else None

    def opening(self) -> list[str]:
        deltas: list[tuple[int, dict[str, Any]]] = [
            (i, {"role": "assistant", "content": ""}) for i in range(len(self.job.requests))
        ]
        deltas += [(i, {"content": echo}) for i, echo in enumerate(self.job.prefixes) if echo]
        return [
            self.chunk({"index": i, "delta": delta, "logprobs": None, "finish_reason": None})
            for i, delta in deltas
        ]

    def delta(self, piece: Delta) -> str:
        delta: dict[str, Any] = {}
        if piece.tool_results:
            delta["calculator"] = [_calculation(r).model_dump() for r in piece.tool_results]
        if piece.text:
            delta["content"] = piece.text
        if piece.tool_calls and (call := self.calls[piece.index]):
            function = {"arguments": "".join(part.arguments for part in piece.tool_calls)}
            if (name := piece.tool_calls[0].name) is None:
                delta["tool_calls"] = [{"index": 0, "function": function}]
            else:
                opening = {"index": 0, "id": call.id, "type": "function"}
                delta["tool_calls"] = [{**opening, "function": {"name": name, **function}}]
        return self.chunk(
            {
                "index": piece.index,
                "delta": delta,
                "logprobs": self._logprobs(piece.logprobs),
                "finish_reason": piece.finish_reason,
            }
        )

    def whole(self) -> dict[str, Any]:
        return ChatResponse(
            id=self.id,
            created=self.created,
            model=self.service.name,
            choices=[
                ChatChoice(
                    index=index,
                    message=self._message(i),
                    logprobs=self._logprobs(self.scored[i]),
                    finish_reason=self.finish[i],
                )
                for index, i in enumerate(self.shown())
            ],
            usage=self.usage(),
        ).model_dump()

    def _message(self, i: int) -> AnswerMessage:
        call = self.calls[i]
        return AnswerMessage(
            content=self.text[i] or None if call else self.text[i],
            tool_calls=[call] if call else None,
            calculator=self.calculations[i] or None,
        )
