"""Bits per byte of any text: how well a model predicts it, whatever its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.offline import OfflineEngine
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextScore:
    bits_per_byte: float
    bytes: int
    tokens: int
    documents: int


def scoring_config(model: ModelConfig, config: EngineConfig) -> EngineConfig:
    """That of an engine for ``evaluate_text``: its context has one token more than the model's, so
    that the last token of a span is predicted from a full context. ``config.max_model_len`` may
    shorten it."""
    length = config.max_model_len or model.sequence_len + 1
    # Spans have no common prefixes.
    return replace(config, max_model_len=length, prefix_cache_tokens=0)


def evaluate_text(
    engine: OfflineEngine, tokenizer: Tokenizer, documents: Iterable[str], *, max_tokens: int = 0
) -> TextScore:
    """Bits per byte over the documents, each from its own beginning, in spans of the context.

    Every byte is predicted once. ``max_tokens`` stops after about that many; 0 takes all. Raises
    ValueError if there is no text.
    """
    lengths = tokenizer.byte_lengths()
    size, tokens, count = 0, 0, 0
    nats: list[float] = []
    """Of each span; the sum is rounded once, so that it does not depend on their order."""

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
        # Special tokens have no bytes and are not counted.
        pairs = [(t, x) for t, x in zip(span[1:], logprobs, strict=True) if lengths[t]]
        nats.append(-math.fsum(logprob for _, logprob in pairs))
        size += sum(int(lengths[token]) for token, _ in pairs)
    if not size:
        raise ValueError("text is empty: there is nothing to measure")
    return TextScore(math.fsum(nats) / math.log(2) / size, size, tokens, count)


def _score(
    engine: OfflineEngine, spans: Iterator[list[int]]
) -> Iterator[tuple[list[int], list[float]]]:
    """Each span with the log-probabilities of its tokens behind the first, in any order."""
    running: dict[str, list[int]] = {}
    params = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)

    def requests() -> Iterator[Request]:
        for number, span in enumerate(spans):
            running[str(number)] = span
            yield Request(id=str(number), prompt=span, params=params)

    for output in engine.run(requests()):
        scores = output.prompt_logprobs or []
        yield running.pop(output.request_id), [s.logprob for s in scores]
