"""Requests and outputs of the engine: plain data, token ids only, no torch.

``to_wire`` and ``from_wire`` convert each to and from values that JSON and MessagePack can carry.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self, get_args

from nanochat_ray.checks import require

Finish = Literal["stop", "length", "abort", "error"]
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
GRAMMARS = ("json_schema", "json_object", "regex", "choice", "lark", "structures")
"""Kinds of grammar that an output may follow."""
MAX_LOGPROBS = 20
"""Alternatives that a request may ask for at each position (OpenAI's limit)."""


class EngineFull(RuntimeError):  # noqa: N818 - a state of the engine, not a fault
    """The queue is full: try again in ``retry_after_s`` seconds, or another engine."""

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStoppedError(RuntimeError):
    """The engine has ended or is stopping: try another one."""


class WeightsReplacedError(Exception):
    """The weights that a request needs are not the engine's any more."""


WEIGHTS_REPLACED = "weights:"
"""Begins the error of a request whose weights were replaced before it was complete."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled and when the output ends. ValueError names a field out of range.

    Order, as in vLLM: bias and penalties, temperature, min-p, then top-k, then top-p.
    """

    temperature: float = 1.0
    """0 is greedy: the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0: off."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, if negative) the logits of tokens in prompt or output (Keskar et al.,
    arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that it is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """Equal seeds give equal tokens; None: a random seed."""
    max_tokens: int = 256
    """Tokens of the output, injected ones (of a tool) included; 0 is allowed with
    ``prompt_logprobs``, to score the prompt alone."""
    min_tokens: int = 0
    """Until the output has this many, no token of ``stop_ids`` or ``eos_ids`` is sampled."""
    stop: tuple[str, ...] = ()
    """Strings that end the output. The engine has no text: ``IncrementalDetokenizer`` searches
    for them."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the output."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end a chat turn, and the output unless ``ignore_eos``."""
    ignore_eos: bool = False
    grammar: Mapping[str, Any] | None = None
    """What the output must follow, as one of ``{"json_schema": {...}}``, ``{"json_object": True}``,
    ``{"regex": "..."}``, ``{"choice": ["a", "b"]}``, ``{"lark": "..."}`` (or llama.cpp's GBNF) and
    ``{"structures": [{"begin": "...", "schema": {...}, "end": "..."}]}``, which is one of these
    texts with a value of its schema inside, as in vLLM's structural tags. Schemas are closed and
    bounded (``json_schema``). The output ends where nothing can be added; where it may end,
    ``stop_ids`` and ``eos_ids`` may end it."""
    logprobs: int | None = None
    """Report the log-probability of each sampled token and of this many likeliest ones."""
    logprobs_mode: LogprobsMode = "raw_logprobs"
    """``logprobs`` of the model's distribution, or "processed_logprobs" of the one that is sampled
    from, after bias, penalties, temperature, min-p, top-k and top-p (vLLM's ``--logprobs-mode``).
    There, tokens that cannot be sampled have -inf."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt from ``prompt_logprobs_start`` on, with the first
    output that has tokens or ``finish``."""
    prompt_logprobs_start: int = 1
    """Index of the first token that is scored. Those before it may come from the prefix cache."""

    def __post_init__(self) -> None:
        req = require
        for name in ("stop", "stop_ids", "eos_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        bias = {int(k): float(v) for k, v in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias)
        for name in ("top_k", "max_tokens", "min_tokens"):
            # The sampler's tables are int64, and min_tokens is added to a length.
            ok = _is_int(getattr(self, name)) and getattr(self, name) < 2**31
            req(ok, name, getattr(self, name), "a whole number below 2**31")
        for name in ("stop_ids", "eos_ids"):
            req(all(map(_is_int, getattr(self, name))), name, getattr(self, name), "token ids")
        t = self.temperature
        req(_is_finite(t) and t >= 0, "temperature", t, "0 or more")
        req(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        req(_is_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        req(_is_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        rep = self.repetition_penalty
        req(_is_finite(rep) and rep > 0, "repetition_penalty", rep, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            req(_is_finite(value) and -2 <= value <= 2, name, value, "from -2 to 2")
        for token, value in bias.items():
            req(token >= 0, "logit_bias", token, "token ids from 0")
            req(_is_finite(value) and -100 <= value <= 100, "logit_bias", value, "from -100 to 100")
        seed = self.seed
        ok = seed is None or (_is_int(seed) and -(2**63) <= seed < 2**64)
        req(ok, "seed", seed, "a 64-bit whole number or None")
        least = 1 if self.prompt_logprobs is None else 0
        req(self.max_tokens >= least, "max_tokens", self.max_tokens, f"from {least}")
        req(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"from 0 to max_tokens={self.max_tokens}",
        )
        texts = all(isinstance(s, str) and s for s in self.stop)
        req(texts, "stop", self.stop, "strings that are not empty")
        check_grammar(self.grammar)
        for name in ("logprobs", "prompt_logprobs"):
            n = getattr(self, name)
            ok = n is None or (_is_int(n) and 0 <= n <= MAX_LOGPROBS)
            req(ok, name, n, f"0 to {MAX_LOGPROBS} or None")
        modes = get_args(LogprobsMode)
        req(self.logprobs_mode in modes, "logprobs_mode", self.logprobs_mode, " or ".join(modes))
        first = self.prompt_logprobs_start
        req(_is_int(first) and first >= 1, "prompt_logprobs_start", first, "from 1")

    @cached_property
    def reports_processed_logprobs(self) -> bool:
        """Whether its log-probabilities are of another distribution than that of the logits."""
        if self.logprobs is None or self.logprobs_mode == "raw_logprobs":
            return False
        is_raw = (
            self.temperature in (0, 1)
            and self.top_k <= 0
            and (self.top_p, self.min_p) == (1, 0)
            and (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
            == (1, 0, 0)
            and not (self.logit_bias or self.min_tokens or self.grammar)
        )
        return not is_raw

    @property
    def all_stop_ids(self) -> frozenset[int]:
        """Tokens that end the output."""
        return frozenset(self.stop_ids) | (frozenset() if self.ignore_eos else set(self.eos_ids))


def check_grammar(grammar: object) -> None:
    """ValueError if its shape is wrong. Only the engine, which has the vocabulary, compiles it."""
    if grammar is None:
        return
    one = isinstance(grammar, Mapping) and len(grammar) == 1 and next(iter(grammar)) in GRAMMARS
    require(one, "grammar", grammar, f"one of {', '.join(GRAMMARS)} with its value, or None")
    assert isinstance(grammar, Mapping)
    ((kind, value),) = grammar.items()
    words = isinstance(value, list | tuple) and all(isinstance(s, str) and s for s in value)
    is_valid, what = {
        "json_schema": (isinstance(value, Mapping | bool), "an object"),
        "json_object": (value is True, "True"),
        "structures": (_structures(value), "a list of objects with begin, schema and end"),
        "choice": (words and len(value) > 0, "texts, at least one, none of them empty"),
    }.get(kind, (isinstance(value, str) and value != "", "a text that is not empty"))
    require(is_valid, f"grammar.{kind}", value, what)


def _structures(value: object) -> bool:
    return (
        bool(value)
        and isinstance(value, list | tuple)
        and all(
            isinstance(one, Mapping)
            and isinstance(one.get("begin"), str)
            and one["begin"] != ""
            and isinstance(one.get("schema"), Mapping | bool)
            and isinstance(one.get("end"), str)
            for one in value
        )
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    ``output_token_ids`` are tokens that another engine has generated already: generation continues
    behind them as if it had never stopped, provided that ``params.seed`` is set (or the temperature
    is 0).
    """

    id: str
    prompt: Sequence[int]
    """Token ids; those of an array or tensor become a list."""
    params: SamplingParams = field(default_factory=SamplingParams)
    output_token_ids: Sequence[int] = ()
    priority: int = 0
    """Lower goes first, and may preempt a running request with a higher number."""
    client: str = ""
    """Within a priority, clients get equal shares, however many requests each of them has."""
    cache_scope: str = ""
    """Prompts share cached prefixes only within a scope. Otherwise response times would reveal to
    one client what another has sent."""
    weight_version: str = ""
    """Only an engine with these weights may process it: it belongs to an answer that has begun
    with them."""
    deadline: float | None = None
    """``time.monotonic`` at which the request fails if it still waits or runs. The wire carries the
    seconds until then, since clocks of two machines differ, and may be set."""

    def __post_init__(self) -> None:
        for name in ("prompt", "output_token_ids"):
            if hasattr(ids := getattr(self, name), "tolist"):
                object.__setattr__(self, name, ids.tolist())
        ok = self.deadline is None or _is_finite(self.deadline)
        require(ok, "deadline", self.deadline, "seconds, or None")
        require(_is_int(self.priority), "priority", self.priority, "a whole number")
        for name in ("cache_scope", "weight_version"):
            require(isinstance(getattr(self, name), str), name, getattr(self, name), "a string")

    def with_seed(self) -> Self:
        """The request with a random seed if it has none. A request that another engine may have to
        continue needs a seed before it is sent anywhere."""
        if self.params.seed is not None:
            return self
        seed = int.from_bytes(os.urandom(8), "little")
        return dataclasses.replace(self, params=dataclasses.replace(self.params, seed=seed))

    def to_wire(self) -> dict[str, Any]:
        wire = dataclasses.asdict(self)
        if self.deadline is not None:
            wire["deadline"] = self.deadline - time.monotonic()
        wire["prompt"], wire["output_token_ids"] = list(self.prompt), list(self.output_token_ids)
        # Pairs, since JSON would turn the ids into strings.
        wire["params"]["logit_bias"] = [[k, v] for k, v in self.params.logit_bias.items()]
        # As text, since MessagePack's integers have 64 bits, and a schema's may have more.
        wire["params"]["grammar"] = self.params.grammar and json.dumps(self.params.grammar)
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        params = dict(wire["params"])
        params["logit_bias"] = {int(k): float(v) for k, v in params.get("logit_bias", ())}
        if params.get("grammar"):
            params["grammar"] = json.loads(params["grammar"])
        deadline = wire.get("deadline")
        if deadline is not None:
            deadline += time.monotonic()
        fields = {**wire, "params": SamplingParams(**params), "deadline": deadline}
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Natural log-probability of a token and of the likeliest ones, before penalties."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """What one step adds to one request.

    Nothing changes it once it is returned. (It is not a frozen dataclass, since that takes three
    times as long to make, and a step makes one for each sequence.)
    """

    request_id: str
    tokens: list[int] = field(default_factory=list)
    """New tokens. With finish "stop" the last one is the stop token (but see ``complete``)."""
    tool_token_indices: list[int] = field(default_factory=list)
    """Indices in ``tokens`` of injected tool-output tokens, which the model did not sample."""
    finish: Finish | None = None
    error: str | None = None
    """Why, if ``finish`` is "error"."""
    logprobs: list[TokenLogprob | None] | None = None
    """One for each of ``tokens`` if requested; None for tool-output tokens."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """One for each token of the prompt from ``prompt_logprobs_start`` on, if requested; reported
    once."""
    complete: bool = False
    """The grammar ended the output: with finish "stop", the last token is part of the text."""
    cached_tokens: int = 0
    """Prompt tokens from the prefix cache, reported with the first token."""
    weight_version: str = ""
    """The weights that generate the output (``Engine.weight_version``), reported with its first
    token."""

    @property
    def last_token_is_stop(self) -> bool:
        """Whether the last token is a stop token, which is no part of the text."""
        return self.finish == "stop" and not self.complete

    def to_wire(self) -> dict[str, Any]:
        """Only what differs from an empty output, since thousands are sent each second."""
        wire: dict[str, Any] = {"id": self.request_id, "tokens": self.tokens}
        names = ("tool_token_indices", "finish", "error", "complete", "cached_tokens")
        for name in (*names, "weight_version"):
            if value := getattr(self, name):
                wire[name] = value
        for name in ("logprobs", "prompt_logprobs"):
            if (logprobs := getattr(self, name)) is not None:
                wire[name] = [p and [p.logprob, p.top] for p in logprobs]
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        rest = {k: v for k, v in wire.items() if k != "id"}
        for name in ("logprobs", "prompt_logprobs"):
            if name in rest:
                rest[name] = [
                    p and TokenLogprob(logprob=p[0], top=[(int(t), float(x)) for t, x in p[1]])
                    for p in rest[name]
                ]
        return cls(request_id=wire["id"], **rest)
