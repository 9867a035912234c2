"""What every endpoint needs: the model's name and limits, tokenizing, and engine requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from nanochat_ray.engine.request import EngineFull, Request, SamplingParams
from nanochat_ray.serve.client import EngineClient
from nanochat_ray.serve.gate import AdmissionGate
from nanochat_ray.serve.generation import Delta, GenerationRequest, Limits, generate
from nanochat_ray.serve.metrics import RequestMetrics
from nanochat_ray.serve.openai import errors
from nanochat_ray.serve.openai.schema.requests import SamplingBody, StreamOptions
from nanochat_ray.text.chat import tool_delimiters
from nanochat_ray.text.tokenizer import Tokenizer

THREAD_CHARACTERS = 20_000
"""Longer texts are tokenized in a thread: at some MB/s they would block every stream."""


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    max_tokens: int
    """Most tokens of an answer."""
    echo: str = ""
    """The text that an answer begins with."""


@dataclass(frozen=True)
class Serving:
    """One model behind the API."""

    client: EngineClient
    tokenizer: Tokenizer
    name: str
    max_model_len: int
    """Longest prompt plus answer, in tokens."""
    limits: Limits
    metrics: RequestMetrics
    gate: AdmissionGate = field(default_factory=AdmissionGate)

    async def admit(self, client: str) -> None:
        """Waits until a request may begin; ApiError 429 if the engines would refuse it."""
        try:
            await self.gate.enter(client)
        except EngineFull as refusal:
            self.metrics.refusals(1, "429")
            raise errors.queue_full(str(refusal), refusal.retry_after_s) from None

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise errors.unknown_model(name, self.name)

    def check_token_ids(self, ids: Sequence[int], param: str) -> None:
        size = self.tokenizer.vocab_size
        for i, token in enumerate(ids):
            if token >= size:
                raise errors.invalid(
                    f"{param}[{i}]={token} is no token: the vocabulary has {size}", param
                )

    def check_choices(self, body: SamplingBody, num_prompts: int) -> None:
        count = body.num_candidates
        if count * num_prompts > self.limits.max_choices:
            field = "n" if count == (body.n or 1) else "best_of"
            prompts = f" for each of {num_prompts} prompts" if num_prompts > 1 else ""
            raise errors.invalid(
                f"{field}={count} is not allowed{prompts}: at most {self.limits.max_choices} "
                "choices of one request",
                field if count > 1 else "prompt",
            )

    def answer_tokens(self, ids: Sequence[int], param: str, max_tokens: int | None) -> int:
        """Most tokens of the answer to a prompt: ``max_tokens``, or as many as fit (None or -1).

        ApiError if the prompt leaves no room.
        """
        room = self.max_model_len - len(ids)
        if room < (max_tokens != 0):
            message = (
                f"This model's maximum context length is {self.max_model_len} tokens, but the "
                f"prompt has {len(ids)} tokens."
            )
            raise errors.invalid(message, param, "context_length_exceeded")
        return room if max_tokens in (None, -1) else min(max_tokens or 0, room)

    async def encode(self, text: str) -> list[int]:
        if len(text) > THREAD_CHARACTERS:
            return await asyncio.to_thread(self.tokenizer.encode, text)
        return self.tokenizer.encode(text)

    async def encode_document(self, text: str) -> list[int]:
        """Token ids of a text prompt: in training every document begins with <|bos|>."""
        return [self.tokenizer.bos, *await self.encode(text)]

    def generation_request(
        self,
        body: SamplingBody,
        prompts: list[Prompt],
        client: str,
        *,
        logprobs: bool,
        prompt_logprobs: int | None = None,
        num_hidden: int = 0,
    ) -> GenerationRequest:
        count, choice = body.num_candidates, body.effective_tool_choice
        options = body.stream_options or StreamOptions()
        grammar_field = "tools" if choice.is_forced else body.grammar_field
        # Without a seed each request draws one; the choices of a request use consecutive seeds.
        seed = secrets.randbits(62) if body.seed is None else body.seed
        scope = cache_scope(client, body.cache_salt or "")
        timeout = self.limits.request_timeout_s
        deadline = time.monotonic() + timeout if timeout else None
        try:
            requests = [
                Request(
                    id=secrets.token_hex(8),
                    prompt=prompt.token_ids,
                    params=self._sampling_params(body, prompt.max_tokens, (seed + i) % 2**63),
                    priority=body.priority or 0,
                    client=client,
                    cache_scope=scope,
                    deadline=deadline,
                )
                for prompt in prompts
                for i in range(count)
            ]
        except ValueError as error:  # a grammar: everything else was validated as a field
            raise errors.invalid_field(error, grammar_field) from None
        return GenerationRequest(
            requests=requests,
            prefixes=[prompt.echo for prompt in prompts for _ in range(count)],
            stop=body.stops,
            stream=bool(body.stream),
            include_usage=options.include_usage,
            logprobs=logprobs,
            prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            tool_choice=choice,
            prompt_logprobs=prompt_logprobs,
            num_hidden=num_hidden,
            n=body.n or 1,
            return_token_ids=bool(body.return_token_ids),
            candidates=count,
            continuous_usage_stats=options.include_usage and options.continuous_usage_stats,
            grammar_field=grammar_field,
        )

    def _sampling_params(self, body: SamplingBody, max_tokens: int, seed: int) -> SamplingParams:
        choice = body.effective_tool_choice
        stop_ids = tuple(body.stop_token_ids or ())
        if choice.calculator:  # the client takes over once the expression is complete
            stop_ids += (tool_delimiters(self.tokenizer).call_end,)
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
            stop_ids=stop_ids,
            # Both a new document and the end of the assistant's turn end an answer.
            eos_ids=(self.tokenizer.bos, self.tokenizer.special("<|assistant_end|>")),
            ignore_eos=bool(body.ignore_eos),
            seed=seed,
            logprobs=body.num_logprobs,
            prompt_logprobs=body.num_prompt_logprobs,
            # response_format is about text, and a forced call leaves no room for text.
            grammar=choice.grammar if choice.is_forced else body.grammar,
        )

    def generate(self, generation: GenerationRequest) -> AsyncGenerator[list[Delta], None]:
        timeout = self.limits.request_timeout_s
        return generate(
            self.client,
            self.tokenizer,
            self.metrics,
            generation,
            timeout,
            submission=lambda: self.gate.submission(generation.requests[0].client),
        )


def cache_scope(client: str, salt: str) -> str:
    """Requests share prefixes of prompts if their API key and salt are the same (CVE-2025-46570).

    Hashed, since a salt is a secret; "" without both.
    """
    if not client and not salt:
        return ""
    return hashlib.sha256(json.dumps([client, salt]).encode()).hexdigest()


def readable(text: str) -> str:
    """The text as the tokenizer reads it, with U+FFFD for lone surrogates: JSON can carry them, but
    UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
