"""The one double of an engine client: it answers every request with tokens given beforehand."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from nanochat_ray.engine.request import EngineFull, Request, RequestOutput, TokenLogprob
from nanochat_ray.serve.client import OutputStream, UnavailableError


def score(token: int) -> TokenLogprob:
    return TokenLogprob(logprob=-token / 100, top=[(65, -0.5)])


class ScriptedClient:
    """``tokens`` one at a time, ``delay`` seconds apart; finished by ``finish``, or never."""

    def __init__(self, tokens: list[int], *, delay: float = 0.0, finish: Any = "stop"):
        self.tokens, self.delay, self.finish = tokens, delay, finish
        self.weight_version = "step-000100-0a1b2c3d"
        self.per_step = 1
        self.error: str | None = None
        self.refuse: Exception | None = None
        self.break_after: int | None = None
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborts: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def submit(self, request: Request, stream: OutputStream) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        self.running.add(request.id)

        def abort() -> None:
            self.aborts.append(request.id)
            self.running.discard(request.id)

        stream.take(request.id, abort)
        task = asyncio.ensure_future(self._play(request, stream))
        self.tasks.append(task)

    async def _play(self, request: Request, stream: OutputStream) -> None:
        tokens = self.tokens[: request.params.max_tokens]
        if self.per_step > 1:
            version = self.weight_version
            output = RequestOutput(request_id=request.id, tokens=tokens, weight_version=version)
            stream.push(output)
            tokens = []
        for i, token in enumerate(tokens):
            await asyncio.sleep(self.delay)
            if request.id not in self.running:
                return
            if i == self.break_after:
                stream.fail(request.id, UnavailableError("the engine was lost"))
                return
            stops = token in request.params.stop_ids
            finish = "stop" if stops else None
            self.running -= {request.id} if stops else set()
            version = "" if i else self.weight_version
            output = RequestOutput(
                request_id=request.id, tokens=[token], finish=finish, weight_version=version
            )
            if request.params.logprobs is not None:
                output = dataclasses.replace(output, logprobs=[score(token)])
            if i == 0 and request.params.prompt_logprobs is not None:
                scores = [score(token) for token in request.prompt[1:]]
                output = dataclasses.replace(output, prompt_logprobs=scores)
            stream.push(output)
            if stops:
                return
        if self.finish is None:
            return
        self.running.discard(request.id)
        short = len(self.tokens) > request.params.max_tokens
        # A real engine's "stop" comes with the token that stopped it.
        last = [] if short or self.finish != "stop" else [max(request.params.eos_ids)]
        finish = "length" if short else self.finish
        stream.push(
            RequestOutput(request_id=request.id, tokens=last, finish=finish, error=self.error)
        )

    async def health(self) -> dict[str, Any]:
        if isinstance(self.refuse, UnavailableError):
            raise self.refuse
        return {"engines": [{"requests": len(self.running)}]}


def full() -> EngineFull:
    return EngineFull("512 requests are waiting")
