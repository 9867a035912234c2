"""Bits per byte of any text: how well a model predicts it, whatever its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.offline import run_requests
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextScore:
    bits_per_byte: float
    bytes: int
    tokens: int
    documents: int


def scoring_engine(model: GPT, tokenizer: Tokenizer, config: EngineConfig) -> Engine:
    """An engine for ``evaluate_text``: its context has one token more than the model's, so that the
    last token of a span is predicted from a full context. ``config.max_model_len`` may shorten it.
    """
    length = config.max_model_len or model.config.sequence_len + 1
    # Spans have no common prefixes.
    config = replace(config, max_model_len=length, prefix_cache_tokens=0)
    return Engine.from_model(model, tokenizer, config)


def evaluate_text(
    engine: Engine, tokenizer: Tokenizer, documents: Iterable[str], *, max_tokens: int = 0
) -> TextScore:
    """Bits per byte over the documents, each from its own beginning, in spans of the context.

    Every byte is predicted once. ``max_tokens`` stops after about that many; 0 takes all. The
    engine is this function's alone while it runs. Raises ValueError if there is no text.
    """
    lengths = tokenizer.byte_lengths()
    nats, size, tokens, count = 0.0, 0, 0, 0

    def spans() -> Iterator[list[int]]:
        nonlocal tokens, count
        for document in documents:
            ids = [tokenizer.bos, *tokenizer.encode(document)]
            count += 1
            for start in range(0, len(ids) - 1, engine.max_model_len - 1):
                span = ids[start : start + engine.max_model_len]
                tokens += len(span) - 1
                yield span
                if 0 < max_tokens <= tokens:
                    return

    for span, logprobs in _score(engine, spans()):
        for token, logprob in zip(span[1:], logprobs, strict=True):
            # Special tokens have no bytes and are not counted.
            if lengths[token]:
                nats -= logprob
                size += int(lengths[token])
    if not size:
        raise ValueError("text is empty: there is nothing to measure")
    return TextScore(nats / math.log(2) / size, size, tokens, count)


def _score(engine: Engine, spans: Iterator[list[int]]) -> Iterator[tuple[list[int], list[float]]]:
    """Each span with the log-probabilities of its tokens behind the first, in any order."""
    running: dict[str, list[int]] = {}
    params = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)

    def requests() -> Iterator[Request]:
        for number, span in enumerate(spans):
            running[str(number)] = span
            yield Request(id=str(number), prompt=span, params=params)

    for output in run_requests(engine, requests()):
        if output.finish == "error":
            raise RuntimeError(f"span {output.request_id}: {output.error}")
        scores = output.prompt_logprobs or []
        yield running.pop(output.request_id), [s.logprob for s in scores]
