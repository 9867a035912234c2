"""Runs any number of requests outside a server, on an engine that the caller steps, or on many."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, Self

from torch import Tensor

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.request import Request, RequestOutput, SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer


class OfflineEngine(Protocol):
    """One engine or many, for one caller at a time."""

    config: EngineConfig
    max_model_len: int
    device_type: str
    """cpu or cuda."""

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """The weights of all later outputs, a state dict of the model, in place. Their
        ``weight_version`` is ``str(version)``. A version that is loaded already is kept."""
        ...

    def run(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        """One output for each request, with all its tokens, in any order. ``requests`` may be read
        ahead of the outputs. ValueError for a request that cannot run (``Engine.validate``),
        RuntimeError for one that failed."""
        ...


class LocalEngine:
    """An engine in this process. Implements ``OfflineEngine``."""

    def __init__(self, engine: Engine):
        self.engine, self.version = engine, -1
        self.config, self.max_model_len = engine.config, engine.max_model_len
        self.device_type = engine.runner.device.type

    @classmethod
    def from_model(cls, model: GPT, tokenizer: Tokenizer, config: EngineConfig) -> Self:
        """An engine with the calculator, on the model's device."""
        return cls(Engine.from_model(model, tokenizer, config))

    def warm_up(self) -> None:
        """Runs a sequence in each slot. The first steps take memory from the system, a page at a
        time, and compile the kernels of a GPU: where others wait for steps, these come before."""
        params = SamplingParams(max_tokens=2, logprobs=0)
        slots = range(self.config.max_num_seqs)
        for _ in self.run([Request(id=f"warm-up/{i}", prompt=[0], params=params) for i in slots]):
            pass

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        for _ in self._load_steps(version, weights):
            pass

    def _load_steps(self, version: int, weights: Mapping[str, Tensor]) -> Iterator[None]:
        if version != self.version:
            self.version = -1  # if it ends early, the weights are of no version
            yield from self.engine.load_steps(weights, str(version))
            self.version = version

    def run(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        return run_requests(self.engine, requests)

    def steps(
        self, version: int, weights: Mapping[str, Tensor], requests: Sequence[Request]
    ) -> Generator[list[RequestOutput], None, None]:
        """``load`` and ``run``, for ``whole_outputs``, in short steps: of one tensor, then of one
        step of the engine. Users of an endpoint may have to wait for one of them."""
        for _ in self._load_steps(version, weights):
            yield []
        yield from run_steps(self.engine, requests)


def run_requests(engine: Engine, requests: Iterable[Request]) -> Iterator[RequestOutput]:
    """As ``OfflineEngine.run``, in the order in which the outputs are complete.

    ``requests`` is read only as far as the engine's queue has room. Nobody else may use the engine
    meanwhile.
    """
    yield from whole_outputs(itertools.chain.from_iterable(run_steps(engine, requests)))
    engine.check_integrity()


def run_steps(
    engine: Engine, requests: Iterable[Request]
) -> Generator[list[RequestOutput], None, None]:
    """The outputs of one step at a time, until all requests are complete. If it is closed before
    its end, the engine is left without requests."""
    source = iter(requests)
    request = next(source, None)
    try:
        while request is not None or engine.has_work:
            while request is not None and engine.scheduler.queue_capacity > 0:
                engine.add(request)
                request = next(source, None)
            yield engine.step()
    finally:
        engine.reset()


def whole_outputs(outputs: Iterable[RequestOutput]) -> Iterator[RequestOutput]:
    """The outputs of each request as one, when it has finished. RuntimeError if it has failed."""
    by_id: dict[str, list[RequestOutput]] = {}
    for output in outputs:
        by_id.setdefault(output.request_id, []).append(output)
        if output.finish in ("stop", "length"):
            yield join_outputs(by_id.pop(output.request_id))
        elif output.finish is not None:
            raise RuntimeError(
                f"request {output.request_id} failed: {output.finish} ({output.error})"
            )


def join_outputs(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """All outputs of a request, in their order, as one."""
    first, last = outputs[0], outputs[-1]
    if first is last:
        return first
    starts = itertools.accumulate((len(output.tokens) for output in outputs), initial=0)
    logprobs = [output.logprobs for output in outputs if output.logprobs is not None]
    prompt_logprobs = (o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None)
    return RequestOutput(
        request_id=first.request_id,
        tokens=[token for output in outputs for token in output.tokens],
        tool_token_indices=[
            start + index
            for start, output in zip(starts, outputs, strict=False)
            for index in output.tool_token_indices
        ],
        finish=last.finish,
        error=last.error,
        logprobs=list(itertools.chain.from_iterable(logprobs)) if logprobs else None,
        prompt_logprobs=next(prompt_logprobs, None),
        complete=last.complete,
        cached_tokens=first.cached_tokens,
        weight_version=first.weight_version,
    )
