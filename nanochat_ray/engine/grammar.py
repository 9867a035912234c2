"""Structured outputs: llguidance parses a grammar, and the engine masks tokens it does not allow.

The state of an output in its grammar is a function of its tokens alone, so that it can be replayed.
G rows with a grammar, W = ceil((V + 1) / 32) words of mask for V tokens.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import llguidance
import llguidance.numpy as masks
import numpy as np
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from nanochat_ray.engine.grammar_ending import Ending, Preferences
from nanochat_ray.engine.json_schema import bound_schema, json_object
from nanochat_ray.engine.request import GRAMMARS, EngineFull

MAX_CACHED = 64
"""Compiled grammars that are cached: a service uses few different ones, many times."""
MAX_CHARACTERS = 128 << 10
"""Of a grammar as JSON. Compile time grows faster than size: 0.1 to 1.5 s at this size."""
SMALL_CHARACTERS = 8 << 10
"""Grammars up to this size compile in milliseconds and never wait for larger ones."""
MAX_PENDING = 32
"""Larger grammars that may wait to be compiled."""
MAX_REASON = 300
"""Characters of llguidance's error that are passed on; a dump of its state may follow them."""
# Rows of the parser grow with alternatives and optional properties: the default, 2,000, is 500 of
# these. Work per step stays bounded (llguidance says 20,000 items take about 1 ms).
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=20_000, step_max_items=200_000, verbose_errors=False
)
# Without whitespace between JSON's tokens: a weak model may otherwise generate it up to its limit.
# A schema's own "x-guidance" takes precedence.
_COMPACT: llguidance.JsonCompileOptions = {"whitespace_flexible": False}  # type: ignore[name-defined]


class _Vocabulary:
    """What llguidance needs of a tokenizer. It uses it to fast-forward only, not to mask."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], end: int):
        self.tokens, self.eos_token_id = tokens, end
        self._single = {token: i for i, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        ids = [self._single.get(raw[i : i + 1]) for i in range(len(raw))]
        return [token for token in ids if token is not None]


@dataclass
class GrammarState:
    """The state of one output in its grammar."""

    matcher: llguidance.LLMatcher
    stop_mask: np.ndarray
    """int32 ``[W]``: bits of the tokens that end the output where the grammar may end."""

    failure: str | None = None
    closing: Ending | None = None
    """Steers the output to an end before its limit; None if the grammar has no end of its own."""

    def feed(self, tokens: Iterable[int]) -> bool:
        """Appends tokens of the output; False, for ever, once one does not follow the grammar."""
        with self.catch_errors():
            if self.closing is None:
                return self.matcher.consume_tokens(list(tokens))
            for token in tokens:
                if not self.matcher.consume_token(token):
                    return False
                self.closing.feed(token, self.matcher)
            return True
        return False

    @contextlib.contextmanager
    def catch_errors(self) -> Iterator[None]:
        """Whatever llguidance raises, a Rust panic too, fails this output and no other."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"

    def count_valid(self, draft: Sequence[int]) -> int:
        """How many of the draft tokens, from the first on, follow the grammar. Changes nothing."""
        with self.catch_errors():
            count = self.matcher.validate_tokens(list(draft))
            return count if self.closing is None else min(count, self.closing.free)
        return 0

    @property
    def is_complete(self) -> bool:
        """Whether the grammar allows no further token."""
        return self.error is None and self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be continued, such as a limit of llguidance; None if it can."""
        if self.failure is None and self.matcher.is_error():
            self.failure = self.matcher.get_error()
        return None if self.failure is None else f"grammar: {_reason(self.failure)}"


class Grammars:
    """Grammars over one vocabulary. ``check`` may be called from any thread."""

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int):
        """``token_bytes[t]`` is the text of token t; empty for one without text, which no grammar
        allows. Missing ids up to ``vocab_size`` (the model's) have no text. ValueError if it has
        more."""
        if len(token_bytes) > vocab_size:
            raise ValueError(
                f"token_bytes has {len(token_bytes)} tokens, the model only {vocab_size}"
            )
        # The end of text is an extra id behind the others, since each request has stop tokens of
        # its own.
        self._end = vocab_size
        self._width = vocab_size // 32 + 1
        tokens = [*token_bytes, *[b""] * (vocab_size - len(token_bytes)), b"\xff<|end|>"]
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokens, self._end))
        self._tokenizer = llguidance.LLTokenizer(wrapper)
        self._preferences = Preferences(tokens[:vocab_size])
        self._executor = llguidance.LLExecutor(1)
        self._small = ThreadPoolExecutor(1, "grammar")
        self._large = ThreadPoolExecutor(1, "large-grammar")
        self._pending = 0
        # Reentrant: a future that is done already runs its callback in ``_submit``'s thread.
        self._lock = threading.RLock()
        self._by_text: WeakValueDictionary[str, Future[llguidance.LLMatcher | str]]
        self._by_text = WeakValueDictionary()
        """The compiled grammar, or the reason why it does not compile."""
        self._latest: OrderedDict[str, Future[llguidance.LLMatcher | str]] = OrderedDict()

    def compile(self, grammar: Mapping[str, Any]) -> Future[llguidance.LLMatcher | str]:
        """Compiles once for all requests, even at the same time: a large grammar may take a second.
        The latest are cached, and each as long as a future of it is referenced. EngineFull if too
        many large ones wait."""
        try:
            text = json.dumps(grammar)
        except RecursionError:
            return _failure("grammar: it is nested too deep")
        if len(text) > MAX_CHARACTERS:
            return _failure(
                f"grammar: it has {len(text):,} characters as JSON, {MAX_CHARACTERS:,} are allowed"
            )
        with self._lock:
            future = self._by_text.get(text)
            if future is None:
                future = self._by_text[text] = self._submit(text)
            self._latest[text] = future
            self._latest.move_to_end(text)
            if len(self._latest) > MAX_CACHED:
                self._latest.popitem(last=False)
            return future

    def _submit(self, text: str) -> Future[llguidance.LLMatcher | str]:
        if len(text) <= SMALL_CHARACTERS:
            return self._small.submit(self._compile, text)
        if self._pending >= MAX_PENDING:
            raise EngineFull(f"grammars={MAX_PENDING} are waiting to be compiled already")
        self._pending += 1
        future = self._large.submit(self._compile, text)
        future.add_done_callback(self._count_down)
        return future

    def _count_down(self, _: object) -> None:
        with self._lock:
            self._pending -= 1

    def check(self, grammar: Mapping[str, Any]) -> llguidance.LLMatcher:
        """ValueError, naming the field, if it does not compile or allows no text."""
        matcher = self.compile(grammar).result()
        if isinstance(matcher, str):
            raise ValueError(matcher)
        return matcher

    def start(
        self,
        grammar: Mapping[str, Any],
        stop_ids: Collection[int],
        output_ids: Sequence[int] = (),
        limit: int = 0,
    ) -> GrammarState:
        """The state behind ``output_ids``. ``stop_ids`` end the output; JSON ends within ``limit``
        tokens if possible (0: no limit). ValueError: see ``check``, or ``output_ids`` do not follow
        the grammar."""
        bits = np.zeros(self._width * 32, dtype=np.uint8)
        bits[list(stop_ids)] = 1
        words = np.packbits(bits, bitorder="little").view(np.int32)
        state = GrammarState(self.check(grammar).deep_copy(), words)
        if limit and not grammar.keys().isdisjoint(("json_schema", "json_object", "structures")):
            state.closing = Ending(limit, self._preferences, self._next)
            with state.catch_errors():
                state.closing.look(state.matcher)
        # A stop token is not part of the text.
        has_stop = bool(output_ids) and output_ids[-1] in stop_ids
        if not state.feed(output_ids[:-1] if has_stop else output_ids):
            raise ValueError(f"output_token_ids: it does not follow the grammar: {state.error}")
        return state

    def _compile(self, text: str) -> llguidance.LLMatcher | str:
        kind = "grammar"
        try:
            ((kind, value),) = json.loads(text).items()
            sources = _sources(kind, value)
            for source in sources:
                matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
                allows_text = not matcher.is_error() and bool(
                    (self._mask_of(matcher) & ~_bit(self._end, self._width)).any()
                )
                if allows_text:
                    break
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of llguidance is not an Exception
            return f"grammar: this {kind} does not compile: {_reason(str(error))}"
        if matcher.is_error():
            return f"grammar: this {kind} does not compile: {_reason(matcher.get_error())}"
        if not allows_text:
            return f"grammar: this {kind} allows no text, or none of these tokens"
        return matcher

    def _next(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        """bool ``[V]``: which tokens are allowed next."""
        words = self._mask_of(matcher).view(np.uint8)
        return np.unpackbits(words, count=self._end, bitorder="little").view(np.bool_)

    def _steer(self, bits: np.ndarray, path: Sequence[int], state: GrammarState) -> None:
        """Allows only the next token of the path or, behind its last one, only stop tokens."""
        if path:
            bits[:] = 0
            bits[path[0]] = 1
            return
        stop_bits = np.unpackbits(
            state.stop_mask.view(np.uint8), count=self._end, bitorder="little"
        )
        if (bits & stop_bits).any():
            bits &= stop_bits

    def _fill(self, plain: list[Any], with_draft: list[Any], words_GW: np.ndarray) -> None:
        if plain:
            masks.fill_next_token_bitmask_par(self._executor, plain, words_GW)
        if with_draft:
            masks.fill_next_token_bitmask_par_with_draft_tokens(
                self._executor, with_draft, words_GW
            )

    def _mask_of(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        words_1W = masks.allocate_token_bitmask(1, self._width * 32)
        masks.fill_next_token_bitmask(matcher, words_1W)
        return words_1W[0]

    def next_token_mask(self, rows: Sequence[tuple[GrammarState, Sequence[int]]]) -> np.ndarray:
        """bool ``[G, V]``: which tokens are allowed next.

        Each state has one row for the next token and one for the token behind each of its draft
        tokens (which must follow the grammar), so G counts both.
        """
        firsts = np.cumsum([0, *(1 + len(draft) for _, draft in rows)])
        words_GW = masks.allocate_token_bitmask(int(firsts[-1]), self._width * 32)
        jobs = [(s.matcher, int(i), list(d)) for (s, d), i in zip(rows, firsts, strict=False)]
        plain = [(matcher, i) for matcher, i, draft in jobs if not draft]
        with_draft = [job for job in jobs if job[2]]
        try:
            self._fill(plain, with_draft, words_GW)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # one by one, so that only the faulty one fails
            for (state, draft), job in zip(rows, jobs, strict=True):
                with state.catch_errors():
                    self._fill([] if draft else [job[:2]], [job] if draft else [], words_GW)
        stop_masks = np.repeat([s.stop_mask for s, _ in rows], np.diff(firsts), axis=0)
        may_end = (words_GW[:, self._end // 32] >> (self._end % 32)) & 1
        words_GW |= stop_masks * may_end[:, None]
        bits = np.unpackbits(words_GW.view(np.uint8), axis=1, count=self._end, bitorder="little")
        for (state, _), row in zip(rows, firsts, strict=False):
            if state.closing is not None and state.closing.path is not None:
                self._steer(bits[row], state.closing.path, state)
        if with_draft:
            # Behind a draft token that completes the grammar nothing is allowed, but a token must
            # be sampled.
            bits[~bits.any(axis=1)] = 1
        return bits.view(np.bool_)


_REGEX_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")


def _failure(reason: str) -> Future[llguidance.LLMatcher | str]:
    future: Future[llguidance.LLMatcher | str] = Future()
    future.set_result(reason)
    return future


def _reason(error: str) -> str:
    """The start of llguidance's error, without the dump of its state."""
    text = " ".join(error.split("<state>")[0].replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"


def _bit(index: int, width: int) -> np.ndarray:
    bits = np.zeros(width * 32, dtype=np.uint8)
    bits[index] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _lark(text: str) -> str:
    """A grammar in Lark's syntax, or in llama.cpp's GBNF, as Lark. ValueError for a GBNF that
    would take long to convert."""
    if is_lark_syntax(text):
        return text
    if len(text) > SMALL_CHARACTERS:  # its conversion takes time with the square of its rules
        raise ValueError(f"GBNF of {len(text):,} characters, {SMALL_CHARACTERS:,} are allowed")
    return gbnf_to_lark(text)


def _sources(kind: str, value: Any) -> list[str]:
    """The grammar in llguidance's format; later entries are used if those before them fail."""
    assert kind in GRAMMARS, kind
    if kind == "regex":
        return [llguidance.LLMatcher.grammar_from_regex(value)]
    if kind == "lark":
        return [llguidance.LLMatcher.grammar_from_lark(_lark(value))]
    if kind == "choice":
        # One lexeme: a separate alternative for each text would be a row of the parser.
        either = "|".join(_REGEX_SPECIAL.sub(r"\\\g<0>", text) for text in dict.fromkeys(value))
        return [llguidance.LLMatcher.grammar_from_regex(f"({either})")]
    if kind == "structures":
        tags = [{**tag, "schema": bound_schema(tag["schema"])} for tag in value]
        return [_structures(tags), _structures(value)]
    # Bounds may contradict keywords of the schema that ``bound_schema`` does not know.
    schemas = [json_object()] if kind == "json_object" else [bound_schema(value), value]
    return [_json_schema(schema) for schema in schemas]


def _json_schema(schema: Any) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)


def _structures(structures: Sequence[Mapping[str, Any]]) -> str:
    """One grammar for each schema, so that references stay local, and one that combines them."""
    schemas: list[dict[str, Any]] = []
    alternatives = []
    for i, one in enumerate(structures):
        (schema,) = json.loads(_json_schema(one["schema"]))["grammars"]
        schemas.append({**schema, "name": f"schema_{i}"})
        begin, end = (json.dumps(one[name], ensure_ascii=False) for name in ("begin", "end"))
        alternatives.append(f"{begin} @schema_{i}" + (f" {end}" if one["end"] else ""))
    start = {"lark_grammar": f"start: {' | '.join(alternatives)}"}
    return json.dumps({"grammars": [start, *schemas]})
