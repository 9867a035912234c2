"""The base of what formats an answer, as one response or chunk by chunk."""

from __future__ import annotations

import json
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.serve.generation import Delta, FinishReason, GenerationRequest, LogprobPair
from nanochat_ray.serve.openai.errors import ApiError
from nanochat_ray.serve.openai.schema.outputs import AnswerToolCall, Calculation, Usage
from nanochat_ray.serve.serving import Serving
from nanochat_ray.serve.sse import DONE, event


@dataclass
class ChoiceState:
    """Everything that one choice has so far."""

    text: str
    calculations: list[Calculation] = field(default_factory=list)
    call: AnswerToolCall | None = None
    logprobs: list[LogprobPair] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0

    def mean_logprob(self) -> float:
        if not self.logprobs:
            return -math.inf
        return sum(token.logprob for _, token in self.logprobs) / len(self.logprobs)


def calculations(delta: Delta) -> list[Calculation]:
    return [{"expression": r.call, "result": r.result} for r in delta.tool_results]


class ResponseBuilder(ABC):
    """Collects the deltas of one answer."""

    object_name = ""

    def __init__(self, serving: Serving, generation: GenerationRequest, id: str):
        self.serving, self.generation, self.id = serving, generation, id
        self.timestamp = int(time.time())
        self.choices = [ChoiceState(prefix) for prefix in generation.prefixes]
        self.num_tokens = 0
        self.weight_version = ""
        self._head = self._chunk_head()
        self._tail = '], "usage": null}\n\n' if generation.include_usage else "]}\n\n"

    @property
    def system_fingerprint(self) -> str | None:
        """Names the weights that answer."""
        return self.weight_version or None

    @property
    def headers(self) -> dict[str, str]:
        """Of the HTTP response, once the first delta is there."""
        return {"x-checkpoint": self.weight_version} if self.weight_version else {}

    def name_weights(self, deltas: Sequence[Delta]) -> None:
        """Takes the weights that answer from the first deltas, before any chunk is made."""
        self.weight_version = next((d.weight_version for d in deltas if d.weight_version), "")
        self._head = self._chunk_head()

    def _chunk_head(self) -> str:
        """The constant part of a chunk is most of it: it is serialized once."""
        head = {
            "id": self.id,
            "object": self.object_name,
            "created": self.timestamp,
            "model": self.serving.name,
            "system_fingerprint": self.system_fingerprint,
        }
        return f'data: {json.dumps(head)[:-1]}, "choices": ['

    def add(self, delta: Delta) -> None:
        self.num_tokens += delta.num_tokens
        choice = self.choices[delta.index]
        choice.cached_tokens += delta.cached_tokens
        choice.text += delta.text
        if delta.tool_results:
            choice.calculations += calculations(delta)
        for part in delta.tool_calls:
            if choice.call is None:
                choice.call = {
                    "id": f"call_{secrets.token_hex(12)}",
                    "type": "function",
                    "function": {"name": part.name or "", "arguments": ""},
                }
            choice.call["function"]["arguments"] += part.arguments
        choice.finish_reason = delta.finish_reason
        choice.logprobs += delta.logprobs
        choice.prompt_logprobs += delta.prompt_logprobs
        choice.token_ids += delta.token_ids

    def ranking(self) -> list[int]:
        """Indices of the choices in the response: with ``best_of`` the likeliest of each prompt, by
        mean log-probability as at OpenAI."""
        n, count = self.generation.n, self.generation.candidates
        indices = range(len(self.choices))
        if count == n:
            return list(indices)
        groups = [indices[first : first + count] for first in indices[::count]]
        by_logprob = [
            sorted(group, key=lambda i: self.choices[i].mean_logprob(), reverse=True)
            for group in groups
        ]
        return [i for group in by_logprob for i in group[:n]]

    def usage(self) -> Usage:
        prompt = self.generation.prompt_tokens
        # A prompt counts once, however many choices share it.
        first_choices = self.choices[:: self.generation.candidates]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt + self.num_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(choice.cached_tokens for choice in first_choices)
            },
        }

    def chunk(self, choice: Mapping[str, Any], fields: Mapping[str, Any] | None = None) -> str:
        """A chunk with one choice, and with further ``fields`` of its own."""
        tail = self._tail
        if self.generation.continuous_usage_stats:
            tail = f'], "usage": {json.dumps(self.usage())}}}\n\n'
        more = f"], {json.dumps(fields)[1:-1]}{tail[1:]}" if fields else tail
        return f"{self._head}{json.dumps(choice)}{more}"

    @abstractmethod
    def opening(self) -> str:
        """Events before the first delta."""

    @abstractmethod
    def chunks(self, delta: Delta) -> str:
        """Events of a delta, which ``add`` has taken."""

    def closing(self) -> str:
        if not self.generation.include_usage:
            return event(DONE)
        usage = json.dumps(self.usage(), separators=(",", ":"))
        return f'{self._head}], "usage": {usage}}}\n\n{event(DONE)}'

    def failure(self, error: ApiError) -> str:
        return event(json.dumps(error.body()))

    @abstractmethod
    def response(self) -> Mapping[str, Any]:
        """The whole answer."""
