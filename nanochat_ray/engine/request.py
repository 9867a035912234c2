"""What goes into the engine and what comes out: plain data, token ids only, no torch.

``to_wire`` and ``from_wire`` turn each into values that JSON and MessagePack can carry.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Finish = Literal["stop", "length", "abort", "error"]
GRAMMARS = ("json_schema", "json_object", "regex", "choice", "lark", "structures")
"""Kinds of grammar that an answer may follow."""
MAX_LOGPROBS = 20
"""Alternatives that may be asked for at each position (OpenAI's limit)."""


class EngineFull(RuntimeError):  # noqa: N818 - a state of the engine, not a fault
    """The queue has reached its bound: try again later, or elsewhere."""


def _require(ok: bool, field: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{field}={value!r} is not allowed: {allowed}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to end. ValueError names a field that is out of range.

    Order, as in vLLM: bias and penalties, temperature, min-p, then top-k, then top-p.
    """

    temperature: float = 1.0
    """0 is greedy: the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens at least this likely, as a share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, if negative) logits of tokens in prompt or answer (Keskar et al.,
    arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time that the answer holds it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """Equal seeds give equal tokens; None draws one when the request is admitted."""
    max_tokens: int = 256
    """Tokens of the answer, forced ones (a tool's output) included; 0, with ``prompt_logprobs``,
    only scores the prompt."""
    min_tokens: int = 0
    """Until the answer has as many, nothing in ``stop_ids`` or ``eos_ids`` is chosen."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer. The engine has no text: ``IncrementalDetokenizer``
    looks for them."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end a turn; with ``ignore_eos`` they do not end the answer."""
    ignore_eos: bool = False
    grammar: Mapping[str, Any] | None = None
    """What the answer must follow, as one of ``{"json_schema": {...}}``, ``{"json_object": True}``,
    ``{"regex": "..."}``, ``{"choice": ["a", "b"]}``, ``{"lark": "..."}`` (or llama.cpp's GBNF) and
    ``{"structures": [{"begin": "...", "schema": {...}, "end": "..."}]}``, which is one of these
    texts with a value of its schema inside, as in vLLM's structural tags. Schemas are closed and
    bounded (``json_schema.bounded``). The answer ends where nothing can be added; where it may
    end, ``stop_ids`` and ``eos_ids`` may end it."""
    logprobs: int | None = None
    """Report the log-probability of each chosen token and of this many likeliest ones."""
    prompt_logprobs: int | None = None
    """The same of each token of the prompt but the first, with the first output that has tokens
    or ends the answer."""

    def __post_init__(self) -> None:
        req = _require
        for name in ("stop", "stop_ids", "eos_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        bias = {int(k): float(v) for k, v in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias)
        for name in ("top_k", "max_tokens", "min_tokens"):
            req(_whole(getattr(self, name)), name, getattr(self, name), "a whole number")
        for name in ("stop_ids", "eos_ids"):
            req(all(map(_whole, getattr(self, name))), name, getattr(self, name), "token ids")
        t = self.temperature
        req(_finite(t) and t >= 0, "temperature", t, "0 or more")
        req(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        req(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        req(_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        rep = self.repetition_penalty
        req(_finite(rep) and rep > 0, "repetition_penalty", rep, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            req(_finite(value) and -2 <= value <= 2, name, value, "from -2 to 2")
        for token, value in bias.items():
            req(token >= 0, "logit_bias", token, "token ids from 0")
            req(_finite(value) and -100 <= value <= 100, "logit_bias", value, "from -100 to 100")
        seed = self.seed
        ok = seed is None or (_whole(seed) and -(2**63) <= seed < 2**64)
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
            ok = n is None or (_whole(n) and 0 <= n <= MAX_LOGPROBS)
            req(ok, name, n, f"0 to {MAX_LOGPROBS} or None")

    @property
    def ending(self) -> frozenset[int]:
        """Tokens that end the answer."""
        return frozenset(self.stop_ids) | (frozenset() if self.ignore_eos else set(self.eos_ids))


def check_grammar(grammar: object) -> None:
    """Its shape alone: whether it compiles is seen by the engine, which has the vocabulary."""
    if grammar is None:
        return
    one = isinstance(grammar, Mapping) and len(grammar) == 1 and next(iter(grammar)) in GRAMMARS
    _require(one, "grammar", grammar, f"one of {', '.join(GRAMMARS)} with its value, or None")
    assert isinstance(grammar, Mapping)
    ((kind, value),) = grammar.items()
    words = isinstance(value, list | tuple) and all(isinstance(s, str) and s for s in value)
    allowed, what = {
        "json_schema": (isinstance(value, Mapping | bool), "an object"),
        "json_object": (value is True, "True"),
        "structures": (_structures(value), "a list of objects with begin, schema and end"),
        "choice": (words and len(value) > 0, "texts, at least one, none of them empty"),
    }.get(kind, (isinstance(value, str) and value != "", "a text that is not empty"))
    _require(allowed, f"grammar.{kind}", value, what)


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
    """One prompt and how to answer it.

    ``generated`` are tokens that another engine has made already: the answer continues after
    them as if it had never stopped, provided that ``params.seed`` is set (or the temperature 0).
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    generated: Sequence[int] = ()
    priority: int = 0
    """Lower goes first, and may push out a running request of a higher number."""
    client: str = ""
    """Within a priority, clients take turns, however many requests each of them has."""
    cache_scope: str = ""
    """Prompts share computed prefixes with those of the same scope alone: how long an answer
    takes would else tell one client what another has sent."""
    deadline: float | None = None
    """Seconds since the epoch at which it fails if it has not ended, waiting or running."""

    def __post_init__(self) -> None:
        ok = self.deadline is None or _finite(self.deadline)
        _require(ok, "deadline", self.deadline, "seconds since the epoch, or None")
        _require(_whole(self.priority), "priority", self.priority, "a whole number")
        _require(isinstance(self.cache_scope, str), "cache_scope", self.cache_scope, "a string")

    def seeded(self) -> Self:
        """The same with a seed drawn for it, if it has none: what may have to continue elsewhere
        must be seeded before it is sent anywhere."""
        if self.params.seed is not None:
            return self
        seed = int.from_bytes(os.urandom(8), "little")
        return dataclasses.replace(self, params=dataclasses.replace(self.params, seed=seed))

    def to_wire(self) -> dict[str, Any]:
        wire = dataclasses.asdict(self)
        wire["prompt"], wire["generated"] = list(self.prompt), list(self.generated)
        # Pairs, since JSON would turn the ids into strings.
        wire["params"]["logit_bias"] = [[k, v] for k, v in self.params.logit_bias.items()]
        # As text, since MessagePack's numbers have 64 bits, and a schema's as many as it likes.
        wire["params"]["grammar"] = self.params.grammar and json.dumps(self.params.grammar)
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        params = dict(wire["params"])
        params["logit_bias"] = {int(k): float(v) for k, v in params.get("logit_bias", ())}
        if params.get("grammar"):
            params["grammar"] = json.loads(params["grammar"])
        return cls(**{**wire, "params": SamplingParams(**params)})


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Natural log-probability of a chosen token and of the likeliest ones, before any penalty."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step did for one request."""

    request_id: str
    tokens: list[int] = field(default_factory=list)
    """New tokens. With finish "stop" the last one is the token that ended the answer (but see
    ``complete``)."""
    forced: list[int] = field(default_factory=list)
    """Which of ``tokens`` (indices) a tool wrote, rather than the model."""
    finish: Finish | None = None
    error: str | None = None
    """Why, if ``finish`` is "error"."""
    logprobs: list[TokenLogprob | None] | None = None
    """One for each of ``tokens`` where the request asked; None for forced ones."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """One for each token of the prompt but the first, where the request asked; told once."""
    complete: bool = False
    """The grammar ended the answer: with finish "stop", the last token is part of it."""
    cached_tokens: int = 0
    """Prompt tokens that needed no computation, told with the first token."""

    @property
    def ended_by_last(self) -> bool:
        """Whether the last token only ended the answer, and is no part of it."""
        return self.finish == "stop" and not self.complete

    def to_wire(self) -> dict[str, Any]:
        """Only what differs from an empty output, since thousands travel each second."""
        wire: dict[str, Any] = {"id": self.request_id, "tokens": self.tokens}
        for name in ("forced", "finish", "error", "complete", "cached_tokens"):
            if value := getattr(self, name):
                wire[name] = value
        for name in ("logprobs", "prompt_logprobs"):
            if (found := getattr(self, name)) is not None:
                wire[name] = [p and [p.logprob, p.top] for p in found]
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
