"""Rollouts: sampled answers, each a pure function of (weights, seed, question, sample)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanochat_ray.engine.offline import OfflineEngine
from nanochat_ray.engine.request import Finish, Request, RequestOutput, SamplingParams


@dataclass(frozen=True)
class Rollout:
    """One answer. ``logprobs[i]`` is that of ``tokens[i]`` when it was sampled, or None if a tool
    injected the token."""

    tokens: list[int]
    logprobs: list[float | None]
    finish: Finish
    version: int
    """Of the weights that sampled it."""

    @classmethod
    def of(cls, output: RequestOutput) -> Rollout:
        """``output``: all of a request, by an engine that has loaded a version."""
        assert output.finish is not None
        logprobs = [None if entry is None else entry.logprob for entry in output.logprobs or ()]
        return cls(output.tokens, logprobs, output.finish, int(output.weight_version))

    @property
    def is_truncated(self) -> bool:
        return self.finish == "length"

    def to_wire(self) -> list[Any]:
        return [self.tokens, self.logprobs, self.finish, self.version]

    @classmethod
    def from_wire(cls, wire: Sequence[Any]) -> Rollout:
        tokens, logprobs, finish, version = wire
        return cls(tokens, logprobs, finish, version)


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


def sample_rollouts(engine: OfflineEngine, requests: Sequence[Request]) -> list[Rollout]:
    """The rollout of each request, in their order."""
    by_id = {output.request_id: output for output in engine.run(requests)}
    return [Rollout.of(by_id[request.id]) for request in requests]
