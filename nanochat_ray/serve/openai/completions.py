"""``/v1/completions``: request to generation request, deltas to response or chunks."""

from __future__ import annotations

from nanochat_ray.serve.generation import Delta, GenerationRequest
from nanochat_ray.serve.openai import logprobs
from nanochat_ray.serve.openai.builder import ResponseBuilder
from nanochat_ray.serve.openai.logprobs import OptionalLogprob, TextOffsets
from nanochat_ray.serve.openai.schema.outputs import (
    CompletionChoice,
    CompletionChunkChoice,
    CompletionLogprobs,
    CompletionResponse,
)
from nanochat_ray.serve.openai.schema.requests import CompletionRequest
from nanochat_ray.serve.serving import Prompt, Serving, readable

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def parse_completion(
    serving: Serving, body: CompletionRequest, client: str = ""
) -> GenerationRequest:
    serving.check_model(body.model)
    texts_or_ids = body.prompts()
    serving.check_choices(body, len(texts_or_ids))
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    prompts: list[Prompt] = []
    for prompt in texts_or_ids:
        if isinstance(prompt, str):
            ids = await serving.encode_document(prompt)
            max_tokens = serving.answer_tokens(ids, "prompt", limit)
            echo = readable(prompt) if body.echo else ""
        else:
            ids = prompt
            max_tokens = serving.answer_tokens(ids, "prompt", limit)
            serving.check_token_ids(ids, "prompt")
            echo = serving.tokenizer.decode(ids) if body.echo else ""
        prompts.append(Prompt(ids, max_tokens, echo))
    return serving.generation_request(
        body,
        prompts,
        client,
        logprobs=body.logprobs is not None,
        prompt_logprobs=body.prompt_logprobs,
        num_hidden=int(isinstance(texts_or_ids[0], str)),  # <|bos|> has no text
    )


class CompletionBuilder(ResponseBuilder):
    object_name = "text_completion"

    def __init__(self, serving: Serving, generation: GenerationRequest, id: str):
        super().__init__(serving, generation, id)
        self._offsets = [TextOffsets(serving.tokenizer) for _ in self.choices]
        """Of a stream: where the next token of each choice begins."""
        self._has_prompt_ids: set[int] = set()
        """Of a stream: choices of which a chunk had the prompt's token ids."""

    def _logprobs(self, delta: Delta, offsets: TextOffsets) -> CompletionLogprobs | None:
        if not self.generation.logprobs:
            return None
        has_echo = self.generation.prefixes[delta.index]
        # The text's own tokens, as clients count them: lm-eval finds a continuation by its index.
        prompt = self._prompt_logprobs(delta)[self.generation.num_hidden :] if has_echo else []
        tokenizer = self.serving.tokenizer
        return logprobs.for_completion(tokenizer, [*prompt, *delta.logprobs], offsets)

    def _prompt_logprobs(self, delta: Delta) -> list[OptionalLogprob]:
        ids = self.generation.requests[delta.index].prompt
        return list(zip(ids, delta.prompt_logprobs, strict=True)) if delta.prompt_logprobs else []

    def opening(self) -> str:
        echoes = self.generation.prefixes
        if self.generation.logprobs and any(echoes):
            return ""  # the echo comes with its log-probabilities, in the first chunk
        return "".join(self.chunks(Delta(i, echo)) for i, echo in enumerate(echoes) if echo)

    def chunks(self, delta: Delta) -> str:
        echo = self.generation.prefixes[delta.index]
        has_echo = bool(echo and delta.prompt_logprobs and self.generation.logprobs)
        has_tokens = delta.num_tokens or has_echo
        scores = self._logprobs(delta, self._offsets[delta.index]) if has_tokens else None
        choice: CompletionChunkChoice = {
            "index": delta.index,
            "text": echo + delta.text if has_echo else delta.text,
            "logprobs": scores,
            "finish_reason": delta.finish_reason,
        }
        if self.generation.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if delta.index not in self._has_prompt_ids:
                self._has_prompt_ids.add(delta.index)
                choice["prompt_token_ids"] = list(self.generation.requests[delta.index].prompt)
        return self.chunk(choice)

    def response(self) -> CompletionResponse:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.timestamp,
            "model": self.serving.name,
            "choices": [self._choice(index, i) for index, i in enumerate(self.ranking())],
            "usage": self.usage(),
            "system_fingerprint": self.system_fingerprint,
        }

    def _choice(self, index: int, i: int) -> CompletionChoice:
        choice = self.choices[i]
        delta = Delta(i, logprobs=choice.logprobs, prompt_logprobs=choice.prompt_logprobs)
        count = self.generation.prompt_logprobs
        prompt_logprobs = None
        if count is not None:
            pairs = self._prompt_logprobs(delta)
            prompt_logprobs = logprobs.for_prompt(self.serving.tokenizer, pairs, count)
        result: CompletionChoice = {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(delta, TextOffsets(self.serving.tokenizer)),
            "finish_reason": choice.finish_reason,
            "prompt_logprobs": prompt_logprobs,
        }
        if self.generation.return_token_ids:
            result["token_ids"] = choice.token_ids
            result["prompt_token_ids"] = list(self.generation.requests[i].prompt)
        return result
