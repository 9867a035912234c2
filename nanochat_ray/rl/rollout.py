"""Rollouts: sampled answers, each a pure function of (weights, seed, question, sample)."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.detokenizer import OutputProcessor, TextEvent, ToolResultEvent
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.offline import run_requests, run_steps
from nanochat_ray.engine.request import Finish, Request, RequestOutput, SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """One answer. ``logprobs[i]`` is that of ``tokens[i]`` when it was sampled, or None if a tool
    injected the token."""

    tokens: list[int]
    logprobs: list[float | None]
    finish: Finish
    version: int
    """Of the weights that sampled it."""

    @property
    def is_truncated(self) -> bool:
        return self.finish == "length"

    def to_wire(self) -> list[Any]:
        return [self.tokens, self.logprobs, self.finish, self.version]

    @classmethod
    def from_wire(cls, wire: Sequence[Any]) -> Rollout:
        tokens, logprobs, finish, version = wire
        return cls(tokens, logprobs, finish, version)


class RolloutGenerator(Protocol):
    """One engine or many."""

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """The weights of all later rollouts."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """The rollout of each request, in their order."""
        ...


def rollout_seed(*key: int) -> int:
    """64 bits for numbers such as (seed, step, task, question, sample)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


def make_requests(
    prompt: Sequence[int], seeds: Sequence[int], params: SamplingParams, name: str
) -> list[Request]:
    """A request for each seed, with ``params`` otherwise; ids begin with ``name``."""
    return [
        Request(id=f"{name}/{sample}", prompt=prompt, params=replace(params, seed=seed))
        for sample, seed in enumerate(seeds)
    ]


class EngineGenerator:
    """One engine in this process."""

    def __init__(self, engine: Engine):
        self.engine, self.version = engine, -1

    @classmethod
    def of_model(cls, model: GPT, tokenizer: Tokenizer, config: EngineConfig) -> EngineGenerator:
        """An engine with the calculator, on the model's device."""
        return cls(Engine.from_model(model, tokenizer, config))

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        for _ in self._load_steps(version, weights):
            pass

    def _load_steps(self, version: int, weights: Mapping[str, Tensor]) -> Iterator[None]:
        if version != self.version:
            self.version = -1  # if it ends early, the weights are of no version
            yield from self.engine.load_steps(weights)
            self.version = version

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        return join_outputs(requests, run_requests(self.engine, requests), self.version)

    def steps(
        self, version: int, weights: Mapping[str, Tensor], requests: Sequence[Request]
    ) -> Generator[list[RequestOutput], None, None]:
        """``load`` and ``generate``, for ``join_outputs``, in short steps: of one tensor, then of
        one step of the engine. Users of an endpoint may have to wait for one of them."""
        for _ in self._load_steps(version, weights):
            yield []
        yield from run_steps(self.engine, requests)


def join_outputs(
    requests: Sequence[Request], outputs: Iterable[RequestOutput], version: int
) -> list[Rollout]:
    """The rollout of each request, by weights of this version. RuntimeError if one has failed."""
    by_id: dict[str, list[RequestOutput]] = {request.id: [] for request in requests}
    for output in outputs:
        by_id[output.request_id].append(output)
    return [_join(by_id[request.id], version) for request in requests]


def _join(outputs: Sequence[RequestOutput], version: int) -> Rollout:
    last = outputs[-1]
    if last.finish not in ("stop", "length"):
        raise RuntimeError(f"rollout {last.request_id} failed: {last.finish} ({last.error})")
    tokens = [token for output in outputs for token in output.tokens]
    logprobs = [
        None if entry is None else entry.logprob
        for output in outputs
        for entry in output.logprobs or ()
    ]
    return Rollout(tokens, logprobs, last.finish, version)


def answer_text(tokenizer: Tokenizer, rollout: Rollout, *, shows_tools: bool = False) -> str:
    """The text that is graded. With ``shows_tools`` calls appear as ``[12*3 = 36]``."""
    processor = OutputProcessor(tokenizer)
    tokens: Iterable[int] = rollout.tokens
    if rollout.finish == "stop":
        tokens = rollout.tokens[:-1]
    parts = []
    for event in [e for token in tokens for e in processor.push(token)] + processor.flush():
        if isinstance(event, TextEvent):
            parts.append(event.text)
        elif isinstance(event, ToolResultEvent) and shows_tools:
            parts.append(f"[{event.call} = {event.result}] ")
    return "".join(parts)
