"""Answers that follow a grammar: llguidance walks it, the engine masks what it does not allow.

Where an answer stands in its grammar is a function of its tokens alone, so that it can be
replayed. G rows with a grammar, W = ceil((V + 1) / 32) words of mask for V tokens.
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
from nanochat_ray.engine.json_schema import bounded, json_object
from nanochat_ray.engine.request import GRAMMARS, EngineFull

KEPT = 64
"""Compiled grammars that are kept: a service asks for few different ones, many times."""
MAX_CHARACTERS = 128 << 10
"""Of a grammar as JSON. Compile time grows faster than size: 0.1 to 1.5 s at this one."""
SMALL_CHARACTERS = 8 << 10
"""Grammars up to this size, which compile in milliseconds, never wait behind larger ones."""
MAX_PENDING = 32
"""Grammars above that size that may wait to be compiled."""
MAX_REASON = 300
"""Characters of llguidance's error that are passed on; a dump of its state may follow them."""
# Rows of the parser grow with alternatives and optional properties: the default, 2,000, is 500 of
# these. Work per step stays bounded (llguidance says 20,000 items take about 1 ms).
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=20_000, step_max_items=200_000, verbose_errors=False
)
# Without blanks between JSON's parts: a weak model may otherwise write blanks until it is cut.
# A schema's own "x-guidance" has the last word.
_COMPACT: llguidance.JsonCompileOptions = {"whitespace_flexible": False}  # type: ignore[name-defined]


class _Words:
    """What llguidance asks of a tokenizer. It needs none to mask, only to guess ahead."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], end: int):
        self.tokens, self.eos_token_id = tokens, end
        self._single = {token: i for i, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        found = [self._single.get(raw[i : i + 1]) for i in range(len(raw))]
        return [token for token in found if token is not None]


@dataclass
class GrammarState:
    """Where one answer stands."""

    matcher: llguidance.LLMatcher
    ending: np.ndarray
    """int32 ``[W]``: bits of the tokens that may end the answer where the grammar may end."""

    failure: str | None = None
    closing: Ending | None = None
    """Holds the answer to an end before its limit; None for what has no end of its own."""

    def feed(self, tokens: Iterable[int]) -> bool:
        """Takes tokens of the answer; False, for good, once one does not follow the grammar."""
        with self.guarded():
            if self.closing is None:
                return self.matcher.consume_tokens(list(tokens))
            for token in tokens:
                if not self.matcher.consume_token(token):
                    return False
                self.closing.feed(token, self.matcher)
            return True
        return False

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever llguidance raises, a Rust panic too, ends this answer and no other."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"

    def agreed(self, draft: Sequence[int]) -> int:
        """How many of the tokens, from the first on, follow the grammar. Changes nothing."""
        with self.guarded():
            agreed = self.matcher.validate_tokens(list(draft))
            return agreed if self.closing is None else min(agreed, self.closing.free)
        return 0

    @property
    def finished(self) -> bool:
        """Whether nothing can be added."""
        return self.error is None and self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why it cannot be followed on, such as a limit of llguidance's; None if it can."""
        if self.failure is None and self.matcher.is_error():
            self.failure = self.matcher.get_error()
        return None if self.failure is None else f"grammar: {_reason(self.failure)}"


class Grammars:
    """Grammars over one vocabulary. ``check`` may be called from any thread."""

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int):
        """``token_bytes[t]`` is the text of token t; empty for one without text, which no grammar
        allows. Ids up to ``vocab_size`` (the model's) that it lacks have none. ValueError if it
        holds more."""
        if len(token_bytes) > vocab_size:
            raise ValueError(
                f"token_bytes has {len(token_bytes)} tokens, the model only {vocab_size}"
            )
        # The end of text is an id of its own behind the others: which tokens end an answer is
        # each request's affair, and several may.
        self._end = vocab_size
        self._width = vocab_size // 32 + 1
        tokens = [*token_bytes, *[b""] * (vocab_size - len(token_bytes)), b"\xff<|end|>"]
        wrapper = llguidance.TokenizerWrapper(_Words(tokens, self._end))
        self._tokenizer = llguidance.LLTokenizer(wrapper)
        self._preferences = Preferences(tokens[:vocab_size])
        self._executor = llguidance.LLExecutor(1)
        self._small = ThreadPoolExecutor(1, "grammar")
        self._large = ThreadPoolExecutor(1, "large-grammar")
        self._pending = 0
        self._lock = threading.Lock()
        self._made: WeakValueDictionary[str, Future[llguidance.LLMatcher | str]]
        self._made = WeakValueDictionary()
        """By text; or why it cannot be made."""
        self._latest: OrderedDict[str, Future[llguidance.LLMatcher | str]] = OrderedDict()

    def compile(self, grammar: Mapping[str, Any]) -> Future[llguidance.LLMatcher | str]:
        """Once for all who ask for it, even at the same time: a large one may take a second. The
        latest are kept, and each for as long as somebody holds what this returns. EngineFull if
        too many large ones wait."""
        try:
            text = json.dumps(grammar)
        except RecursionError:
            return _refused("grammar: it is nested too deep")
        if len(text) > MAX_CHARACTERS:
            return _refused(
                f"grammar: it has {len(text):,} characters as JSON, {MAX_CHARACTERS:,} are allowed"
            )
        with self._lock:
            made = self._made.get(text)
            if made is None:
                made = self._made[text] = self._submit(text)
            self._latest[text] = made
            self._latest.move_to_end(text)
            if len(self._latest) > KEPT:
                self._latest.popitem(last=False)
            return made

    def _submit(self, text: str) -> Future[llguidance.LLMatcher | str]:
        if len(text) <= SMALL_CHARACTERS:
            return self._small.submit(self._compile, text)
        if self._pending >= MAX_PENDING:
            raise EngineFull(f"grammars={MAX_PENDING} are waiting to be compiled already")
        self._pending += 1
        future = self._large.submit(self._compile, text)
        future.add_done_callback(self._compiled)
        return future

    def _compiled(self, _: object) -> None:
        self._pending -= 1  # in the one thread of the large ones

    def check(self, grammar: Mapping[str, Any]) -> llguidance.LLMatcher:
        """ValueError, naming the field, if it does not compile or allows no text."""
        made = self.compile(grammar).result()
        if isinstance(made, str):
            raise ValueError(made)
        return made

    def start(
        self,
        grammar: Mapping[str, Any],
        ending: Collection[int],
        made: Sequence[int] = (),
        limit: int = 0,
    ) -> GrammarState:
        """An answer that ``ending`` tokens may end, of which ``made`` is there; JSON ends within
        ``limit`` tokens where it can (0: no limit). ValueError: see ``check``, or ``made`` does not
        follow."""
        bits = np.zeros(self._width * 32, dtype=np.uint8)
        bits[list(ending)] = 1
        words = np.packbits(bits, bitorder="little").view(np.int32)
        state = GrammarState(self.check(grammar).deep_copy(), words)
        if limit and not grammar.keys().isdisjoint(("json_schema", "json_object", "structures")):
            state.closing = Ending(limit, self._preferences, self._next)
            with state.guarded():
                state.closing.look(state.matcher)
        # The token that ended the answer is not part of its text.
        if not state.feed(made[:-1] if made and made[-1] in ending else made):
            raise ValueError(f"generated: it does not follow the grammar: {state.error}")
        return state

    def _compile(self, text: str) -> llguidance.LLMatcher | str:
        kind = "grammar"
        try:
            ((kind, value),) = json.loads(text).items()
            sources = _sources(kind, value)
            for source in sources:
                matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
                some = not matcher.is_error() and bool(
                    (self._one(matcher) & ~_bit(self._end, self._width)).any()
                )
                if some:
                    break
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of llguidance's is no Exception
            return f"grammar: this {kind} does not compile: {_reason(str(error))}"
        if matcher.is_error():
            return f"grammar: this {kind} does not compile: {_reason(matcher.get_error())}"
        if not some:
            return f"grammar: this {kind} allows no text, or none of these tokens"
        return matcher

    def _next(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        """bool ``[V]``: which tokens may come."""
        words = self._one(matcher).view(np.uint8)
        return np.unpackbits(words, count=self._end, bitorder="little").view(np.bool_)

    def _hold(self, bits: np.ndarray, path: Sequence[int], state: GrammarState) -> None:
        """Leaves the path's next token alone, or behind its last one those that end the answer."""
        if path:
            bits[:] = 0
            bits[path[0]] = 1
            return
        ending = np.unpackbits(state.ending.view(np.uint8), count=self._end, bitorder="little")
        if (bits & ending).any():
            bits &= ending

    def _fill(self, plain: list[Any], drafted: list[Any], found: np.ndarray) -> None:
        if plain:
            masks.fill_next_token_bitmask_par(self._executor, plain, found)
        if drafted:
            masks.fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, found)

    def _one(self, matcher: llguidance.LLMatcher) -> np.ndarray:
        found = masks.allocate_token_bitmask(1, self._width * 32)
        masks.fill_next_token_bitmask(matcher, found)
        return found[0]

    def allowed(self, rows: Sequence[tuple[GrammarState, Sequence[int]]]) -> np.ndarray:
        """bool ``[G, V]``: which tokens may come.

        Each state has one row for the next token and then one for the token behind each of its
        draft's (all of which must agree with the grammar), so G counts both.
        """
        firsts = np.cumsum([0, *(1 + len(draft) for _, draft in rows)])
        found = masks.allocate_token_bitmask(int(firsts[-1]), self._width * 32)
        placed = [(s.matcher, int(at), list(d)) for (s, d), at in zip(rows, firsts, strict=False)]
        plain = [(matcher, at) for matcher, at, draft in placed if not draft]
        drafted = [each for each in placed if each[2]]
        try:
            self._fill(plain, drafted, found)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # one by one, so that each fails alone
            for (state, draft), (matcher, at, tokens) in zip(rows, placed, strict=True):
                with state.guarded():
                    one = (matcher, at, tokens)
                    self._fill([] if draft else [one[:2]], [one] if draft else [], found)
        ending = np.repeat([s.ending for s, _ in rows], np.diff(firsts), axis=0)
        may_end = (found[:, self._end // 32] >> (self._end % 32)) & 1
        found |= ending * may_end[:, None]
        bits = np.unpackbits(found.view(np.uint8), axis=1, count=self._end, bitorder="little")
        for (state, _), row in zip(rows, firsts, strict=False):
            if state.closing is not None and state.closing.path is not None:
                self._hold(bits[row], state.closing.path, state)
        if drafted:
            # Behind a guess that ends it nothing may come, but something must be chosen.
            bits[~bits.any(axis=1)] = 1
        return bits.view(np.bool_)


_REGEX_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~-]")


def _refused(reason: str) -> Future[llguidance.LLMatcher | str]:
    future: Future[llguidance.LLMatcher | str] = Future()
    future.set_result(reason)
    return future


def _reason(error: str) -> str:
    """The first of llguidance's error, which may go on with all of its state."""
    text = " ".join(error.split("<state>")[0].replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"


def _bit(at: int, width: int) -> np.ndarray:
    bits = np.zeros(width * 32, dtype=np.uint8)
    bits[at] = 1
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
    """A grammar as llguidance reads it; the later ones are for where those before fail."""
    assert kind in GRAMMARS, kind
    if kind == "regex":
        return [llguidance.LLMatcher.grammar_from_regex(value)]
    if kind == "lark":
        return [llguidance.LLMatcher.grammar_from_lark(_lark(value))]
    if kind == "choice":
        # One lexeme: an alternative of its own for each text would be a row of the parser.
        either = "|".join(_REGEX_SPECIAL.sub(r"\\\g<0>", text) for text in dict.fromkeys(value))
        return [llguidance.LLMatcher.grammar_from_regex(f"({either})")]
    if kind == "structures":
        closed = [{**one, "schema": bounded(one["schema"])} for one in value]
        return [_structures(closed), _structures(value)]
    # Bounds may not go together with what a schema asks for in ways that they know nothing of.
    schemas = [json_object()] if kind == "json_object" else [bounded(value), value]
    return [_json_schema(schema) for schema in schemas]


def _json_schema(schema: Any) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)


def _structures(structures: Sequence[Mapping[str, Any]]) -> str:
    """One grammar for each schema, whose references then stay its own, and one over them all."""
    schemas: list[dict[str, Any]] = []
    alternatives = []
    for i, one in enumerate(structures):
        (schema,) = json.loads(_json_schema(one["schema"]))["grammars"]
        schemas.append({**schema, "name": f"schema_{i}"})
        begin, end = (json.dumps(one[name], ensure_ascii=False) for name in ("begin", "end"))
        alternatives.append(f"{begin} @schema_{i}" + (f" {end}" if one["end"] else ""))
    start = {"lark_grammar": f"start: {' | '.join(alternatives)}"}
    return json.dumps({"grammars": [start, *schemas]})
