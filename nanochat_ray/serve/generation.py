"""From a generation request to the deltas of its answers, over any ``EngineClient``."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

from nanochat_ray.engine.detokenizer import (
    Event,
    OutputProcessor,
    TextEvent,
    ToolCallEvent,
    ToolResultEvent,
)
from nanochat_ray.engine.request import (
    WEIGHTS_REPLACED,
    EngineFull,
    Request,
    RequestOutput,
    TokenLogprob,
    WeightsReplacedError,
)
from nanochat_ray.serve.client import EngineClient, OutputStream, UnavailableError
from nanochat_ray.serve.metrics import RequestMetrics, Timer
from nanochat_ray.text.chat import tool_delimiters
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tool_calls import CallDelta, CallStream, ToolChoice

FinishReason = Literal["stop", "length", "tool_calls"]
SUBMISSIONS = 3
"""Tries to submit the requests of an answer while weights are replaced."""
LogprobPair = tuple[int, TokenLogprob]
"""A token of the answer and its log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_body_bytes: int = 2 << 20
    body_timeout_s: float = 60.0
    """How long the body of a request may take to arrive."""
    max_choices: int = 128
    """Prompts times choices of one request."""
    request_timeout_s: float = 0.0
    """How long an answer may wait and run; 0 is no limit. Requests have no field for it: OpenAI's
    clients close the connection, which aborts the work too."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One HTTP request as engine requests: ``candidates`` for each prompt, in order of index."""

    requests: list[Request]
    prefixes: list[str]
    """The text that each choice begins with: the prompt, if it is echoed."""
    stop: list[str]
    stream: bool
    include_usage: bool
    """Whether the last chunk of a stream has token counts."""
    logprobs: bool
    prompt_tokens: int
    tool_choice: ToolChoice
    prompt_logprobs: int | None = None
    """Alternatives for each token of the prompt in vLLM's ``prompt_logprobs``."""
    num_hidden: int = 0
    """Tokens at the start of each prompt that are not in its text, nor in the echo's logprobs."""
    n: int = 1
    """Choices of each prompt in the response."""
    return_token_ids: bool = False
    candidates: int = 1
    """Choices of each prompt that are generated: more than ``n`` with ``best_of``."""
    continuous_usage_stats: bool = False
    """Whether every chunk has the token counts so far; only with ``include_usage``."""
    grammar_field: str = ""
    """The field of the HTTP request that the grammar comes from, for error messages."""


@dataclass
class Delta:
    """What one step of the engine added to one choice."""

    index: int
    text: str = ""
    tool_results: list[ToolResultEvent] = field(default_factory=list)
    logprobs: list[LogprobPair] = field(default_factory=list)
    """Tokens of the text with their log-probabilities, if the request asks for these."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """For each token of the prompt, in the first delta, if the request asks for these."""
    num_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    """All ``num_tokens`` of them, if the request asks for these: special tokens, a tool's output
    and the token that ended the answer too."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    tool_calls: list[CallDelta] = field(default_factory=list)
    """Parts of a call that the client is to execute."""
    finish_reason: FinishReason | None = None
    weight_version: str = ""
    """The weights that answer (``Engine.weight_version``), in the first delta."""

    @property
    def is_visible(self) -> bool:
        """False while there is only half a character or half a stop string."""
        return bool(
            self.text
            or self.tool_results
            or self.logprobs
            or self.prompt_logprobs
            or self.tool_calls
            or self.token_ids
            or self.finish_reason
        )


class EngineFailedError(Exception):
    """The engine ended a request with an error."""


class GrammarError(EngineFailedError):
    """The grammar of the request is too large or too complex."""


class DeadlineError(EngineFailedError):
    """The request's time was over."""


class Choice:
    """Turns the outputs of one engine request into deltas."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        stop: list[str],
        tool_choice: ToolChoice,
        min_tokens: int,
    ):
        self.index = index
        self._tool_choice = tool_choice
        self._call_end = tool_delimiters(tokenizer).call_end if tool_choice.calculator else -1
        has_grammar = tool_choice.grammar is not None
        self._call = CallStream(tool_choice.functions) if has_grammar else None
        self._has_call = False
        self._processor = OutputProcessor(
            tokenizer,
            stop,
            min_tokens=min_tokens,
            begins_in_call=tool_choice.is_forced,
            streams_call=has_grammar,
        )

    def push(self, output: RequestOutput) -> Delta:
        delta = Delta(
            self.index,
            num_tokens=len(output.tokens),
            cached_tokens=output.cached_tokens,
            weight_version=output.weight_version,
        )
        if output.prompt_logprobs is not None:
            delta.prompt_logprobs = [None, *output.prompt_logprobs]  # the first token has none
        tokens = output.tokens
        if output.last_token_is_stop and tokens[-1] != self._call_end:
            tokens = tokens[:-1]  # the token that ended the answer is no part of its text
        for i, token in enumerate(tokens):
            for event in self._processor.push(token):
                self._add(event, delta)
                if output.logprobs is not None and isinstance(event, TextEvent):
                    logprob = output.logprobs[i]
                    if logprob is not None:
                        delta.logprobs.append((token, logprob))
            if delta.finish_reason is not None:
                delta.num_tokens = i + 1  # draft tokens behind it are no part of the answer
                break
        return delta

    def finish(self, delta: Delta, reason: Literal["stop", "length"]) -> None:
        """Adds the text that was still pending."""
        if delta.finish_reason is not None:
            return
        for event in self._processor.flush():
            self._add(event, delta)
        if self._call is not None:
            self._add_call(self._call.flush(complete=reason == "stop"), delta)
        # As at OpenAI, a call that the client has named ends with "stop".
        is_call = self._has_call and reason == "stop" and self._tool_choice.mode != "named"
        delta.finish_reason = "tool_calls" if is_call else reason

    def _add(self, event: Event, delta: Delta) -> None:
        if isinstance(event, TextEvent):
            delta.text += event.text
            if self._processor.is_stopped:
                delta.finish_reason = "stop"
        elif isinstance(event, ToolResultEvent):
            delta.tool_results.append(event)
        else:
            self._on_call(event, delta)

    def _on_call(self, event: ToolCallEvent, delta: Delta) -> None:
        if self._call is not None:
            self._add_call(self._call.push(event.text), delta)
        elif (call := self._tool_choice.parse(event.text)) is not None:
            self._add_call([call], delta)
        if event.is_complete and self._has_call:
            self.finish(delta, "stop")

    def _add_call(self, parts: list[CallDelta], delta: Delta) -> None:
        self._has_call = self._has_call or bool(parts)
        delta.tool_calls += parts


async def generate(
    client: EngineClient,
    tokenizer: Tokenizer,
    metrics: RequestMetrics,
    generation: GenerationRequest,
    timeout_s: float,
    *,
    submission: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> AsyncGenerator[list[Delta], None]:
    """Deltas of all choices as they come, those of one step of the engine together.

    ``submission``: entered while the engines decide whether they take the requests. Closing the
    generator aborts the requests that still run. Raises EngineFailedError and the errors of
    ``EngineClient.submit``.
    """
    stream = OutputStream()
    running: dict[str, tuple[Choice, Timer]] = {}
    try:
        timers = [metrics.timer() for _ in generation.requests]
        with submission():
            requests = await _submit_all(client, generation.requests, stream)
        for i, (request, timer) in enumerate(zip(requests, timers, strict=True)):
            timer.accept(len(request.prompt))
            min_tokens = request.params.min_tokens
            choice = Choice(tokenizer, i, generation.stop, generation.tool_choice, min_tokens)
            running[request.id] = choice, timer
        async for outputs in stream:
            deltas = []
            for output in outputs:
                if output.request_id not in running:
                    continue  # a stop string has ended it
                choice, timer = running[output.request_id]
                delta = choice.push(output)
                if generation.return_token_ids:
                    delta.token_ids = output.tokens[: delta.num_tokens]
                if delta.num_tokens:
                    timer.tokens(delta.num_tokens)
                if output.finish in ("stop", "length"):
                    choice.finish(delta, output.finish)
                elif output.finish is not None and delta.finish_reason is None:
                    timer.end("error")
                    raise _error(output, timeout_s)
                if (reason := delta.finish_reason) is not None:
                    timer.end("stop" if reason == "tool_calls" else reason)
                    del running[output.request_id]
                    stream.abort(output.request_id)
                deltas.append(delta)
            yield deltas
    finally:
        for _, timer in running.values():
            timer.end("abort")
        stream.close()


async def _submit_all(
    client: EngineClient, requests: Sequence[Request], stream: OutputStream
) -> Sequence[Request]:
    """Submits the requests of one answer, all to engines with the same weights; returns them as
    submitted. UnavailableError if the weights are replaced again and again meanwhile."""
    if len(requests) == 1:
        await client.submit(requests[0], stream)
        return requests
    for _ in range(SUBMISSIONS):
        version = client.weight_version
        # New ids, so that late outputs of an earlier try match no request.
        batch = [replace(r, id=secrets.token_hex(8), weight_version=version) for r in requests]
        try:
            for request in batch:
                await client.submit(request, stream)
        except WeightsReplacedError:
            stream.close()
            continue
        return batch
    raise UnavailableError(f"{WEIGHTS_REPLACED} they were replaced {SUBMISSIONS} times in a row")


def _error(output: RequestOutput, timeout_s: float) -> Exception:
    """The error that an engine's reason stands for: a reason begins with the field that failed."""
    reason = output.error or f"the engine ended the answer ({output.finish})"
    if reason.startswith("grammar:"):
        return GrammarError(reason)
    if reason.startswith("deadline:"):
        return DeadlineError(f"the answer was not ready after {timeout_s:g} s, the limit")
    if reason.startswith(WEIGHTS_REPLACED):
        return UnavailableError(reason)
    # The queue filled up after the request was accepted, or was slower than expected.
    if reason.startswith(("max_queue_size=", "max_queue_s=")):
        return EngineFull(reason)
    return EngineFailedError(reason)
