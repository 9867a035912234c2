"""From a checked request to engine requests: templates, tokenizing, limits."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.serve import errors
from nanochat_ray.serve.client import EngineClient
from nanochat_ray.serve.conversation import ChatMessage, message_text, turns
from nanochat_ray.serve.generation import GenerationRequest
from nanochat_ray.serve.metrics import RequestMetrics
from nanochat_ray.serve.protocol import ChatRequest, CompletionRequest, SamplingBody
from nanochat_ray.text.chat import render_prompt
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tool_calls import ToolChoice

# Longer texts are tokenized beside the event loop: at some MB/s they would hold up every stream.
ASIDE_CHARACTERS = 20_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_body_bytes: int = 2 << 20
    body_timeout_s: float = 60.0
    """How long the body of a request may take to come."""
    max_choices: int = 128
    """Prompts times ``n`` of one request."""
    request_timeout_s: float = 0.0
    """How long an answer may take, waiting and running; 0 is for ever. Clients have no field for
    it: OpenAI's give up by closing the connection, which ends the work too."""


@dataclass(frozen=True)
class Service:
    client: EngineClient
    tokenizer: Tokenizer
    name: str
    max_model_len: int
    """Longest prompt plus answer, in tokens."""
    limits: Limits
    metrics: RequestMetrics

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise errors.unknown_model(name, self.name)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        size = self.tokenizer.vocab_size
        for i, token in enumerate(ids):
            if token >= size:
                raise errors.invalid(
                    f"{param}[{i}]={token} is no token: the vocabulary has {size}", param
                )

    async def encode(self, text: str) -> list[int]:
        if len(text) > ASIDE_CHARACTERS:
            return await asyncio.to_thread(self.tokenizer.encode, text)
        return self.tokenizer.encode(text)

    async def text_prompt(self, text: str) -> list[int]:
        # The model has seen every document begin with it.
        return [self.tokenizer.bos, *await self.encode(text)]

    async def chat_prompt(self, body: ChatRequest) -> list[int]:
        if len(body.messages) >= self.max_model_len:  # every message has two tokens, or more
            raise errors.invalid(
                f"This model's longest sequence is {self.max_model_len} tokens, but there are "
                f"{len(body.messages)} messages.",
                "messages",
                "context_length_exceeded",
            )
        try:
            declared = body.tools if body.calling.mode != "none" else None
            found = turns(body.messages, declared or ())
            if sum(map(_characters, body.messages)) > ASIDE_CHARACTERS:
                ids = await asyncio.to_thread(self._render, found, body)
            else:
                ids = self._render(found, body)
        except ValueError as error:
            raise errors.invalid(str(error), "messages") from None
        if body.calling.is_forced:
            ids.append(self.tokenizer.special("<|python_start|>"))
        return ids

    def _render(self, found: list[dict[str, Any]], body: ChatRequest) -> list[int]:
        return render_prompt(
            self.tokenizer,
            found,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
        )

    async def chat_job(self, body: ChatRequest, client: str = "") -> GenerationRequest:
        self.check_model(body.model)
        ids = await self.chat_prompt(body)
        limit = body.max_completion_tokens or body.max_tokens
        echoed = body.echo and body.messages[-1].role == "assistant"
        echo = readable(message_text(body.messages[-1])) if echoed else ""
        return self._job(body, "messages", [ids], [echo], limit, client)

    async def completion_job(self, body: CompletionRequest, client: str = "") -> GenerationRequest:
        self.check_model(body.model)
        self._check_choices(body, len(body.prompts()))
        prompts: list[list[int]] = []
        echoes: list[str] = []
        for prompt in body.prompts():
            if isinstance(prompt, str):
                prompts.append(await self.text_prompt(prompt))
                echoes.append(readable(prompt))
            else:
                self._room(prompt, "prompt", body.max_tokens)
                self.check_ids(prompt, "prompt")
                prompts.append(prompt)
                echoes.append(self.tokenizer.decode(prompt) if body.echo else "")
        echoes = echoes if body.echo else [""] * len(prompts)
        limit = 16 if body.max_tokens is None else body.max_tokens  # 16 is OpenAI's default
        return self._job(body, "prompt", prompts, echoes, limit, client)

    def _check_choices(self, body: SamplingBody, prompts: int) -> int:
        """Answers that are made for each of so many prompts. ApiError if those are too many."""
        n = body.n or 1
        candidates = body.candidates if isinstance(body, CompletionRequest) else n
        if candidates * prompts > self.limits.max_choices:
            raise errors.invalid(
                f"{'n' if candidates == n else 'best_of'}={candidates} for {prompts} prompts "
                f"is more than {self.limits.max_choices} choices",
                "n",
            )
        return candidates

    def _job(
        self,
        body: SamplingBody,
        param: str,
        prompts: list[list[int]],
        echoes: list[str],
        max_tokens: int | None,
        client: str,
    ) -> GenerationRequest:
        """``max_tokens``: None or -1 is all that fits behind a prompt, and more is cut to that."""
        n = body.n or 1
        candidates = self._check_choices(body, len(prompts))
        limits = [self._room(ids, param, max_tokens) for ids in prompts]
        # Without a seed of its own, each request draws another one; choices differ by their place.
        seed = secrets.randbits(62) if body.seed is None else body.seed
        scope = cache_scope(client, body.cache_salt or "")
        timeout = self.limits.request_timeout_s
        deadline = time.time() + timeout if timeout else None
        requests = [
            Request(
                id=secrets.token_hex(8),
                prompt=ids,
                params=self._params(body, limit, (seed + i) % 2**63),
                priority=body.priority or 0,
                client=client,
                cache_scope=scope,
                deadline=deadline,
            )
            for ids, limit in zip(prompts, limits, strict=True)
            for i in range(candidates)
        ]
        return GenerationRequest(
            requests=requests,
            prefixes=[echo for echo in echoes for _ in range(candidates)],
            stop=body.stops,
            stream=bool(body.stream),
            include_usage=body.include_usage,
            logprobs=_logprobs(body) is not None,
            prompt_tokens=sum(map(len, prompts)),
            tool_choice=_calling(body),
            prompt_logprobs=getattr(body, "prompt_logprobs", None),
            hidden=int(isinstance(body, CompletionRequest) and isinstance(body.prompts()[0], str)),
            n=n,
            candidates=candidates,
        )

    def _room(self, ids: Sequence[int], param: str, max_tokens: int | None) -> int:
        """Tokens that the answer to a prompt may have. ApiError if not one fits that is needed."""
        room = self.max_model_len - len(ids)
        if room < (max_tokens != 0):
            message = (
                f"This model's maximum context length is {self.max_model_len} tokens, but the "
                f"prompt has {len(ids)} tokens."
            )
            raise errors.invalid(message, param, "context_length_exceeded")
        return room if max_tokens in (None, -1) else min(max_tokens or 0, room)

    def _stop_ids(self, body: SamplingBody) -> tuple[int, ...]:
        ids = tuple(body.stop_token_ids or ())
        # Where the expression is written the client takes over.
        calculator = _calling(body).calculator
        return (*ids, self.tokenizer.special("<|python_end|>")) if calculator else ids

    def _params(self, body: SamplingBody, max_tokens: int, seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(0, body.top_k or 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
            max_tokens=max_tokens,
            min_tokens=min(body.min_tokens or 0, max_tokens),
            stop_ids=self._stop_ids(body),
            # Both a new document and the end of the assistant's turn end an answer.
            eos_ids=(self.tokenizer.bos, self.tokenizer.special("<|assistant_end|>")),
            ignore_eos=bool(body.ignore_eos),
            seed=seed,
            logprobs=_logprobs(body) or 0 if _ranked(body) else _logprobs(body),
            prompt_logprobs=body.prompt_scores if isinstance(body, CompletionRequest) else None,
            # response_format is about text, and a call that is forced leaves no room for any.
            grammar=_calling(body).grammar if _calling(body).is_forced else body.grammar,
        )


def cache_scope(client: str, salt: str) -> str:
    """Who shares computed prefixes: all who send neither an API key nor a salt, else those with
    the same ones (CVE-2025-46570). Hashed, since a salt is a secret."""
    if not client and not salt:
        return ""
    return hashlib.sha256(json.dumps([client, salt]).encode()).hexdigest()


def readable(text: str) -> str:
    """The text with U+FFFD for lone surrogates, as the tokenizer reads it: JSON can carry them, but
    UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _characters(message: ChatMessage) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(part.text or "") for part in message.content or [])


def _calling(body: SamplingBody) -> ToolChoice:
    return body.calling if isinstance(body, ChatRequest) else ToolChoice()


def _ranked(body: SamplingBody) -> bool:
    """Whether answers are compared by their likelihood."""
    return isinstance(body, CompletionRequest) and body.candidates > (body.n or 1)


def _logprobs(body: SamplingBody) -> int | None:
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionRequest) else None
