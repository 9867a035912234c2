"""Answers that follow a grammar: llguidance walks it, the engine masks what it does not allow.

Where an answer stands in its grammar is a function of its tokens alone, so that it can be
replayed. G rows with a grammar, W = ceil((V + 1) / 32) words of mask for V tokens.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import llguidance
import llguidance.numpy as masks
import numpy as np

from nanochat_ray.engine.request import GRAMMARS

KEPT = 64
"""Compiled grammars that are kept: a service asks for few different ones, many times."""
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

    def feed(self, tokens: Iterable[int]) -> bool:
        """Takes tokens of the answer; False, for good, once one does not follow the grammar."""
        return self.matcher.consume_tokens(list(tokens))

    def agreed(self, draft: Sequence[int]) -> int:
        """How many of the tokens, from the first on, follow the grammar. Changes nothing."""
        return self.matcher.validate_tokens(list(draft))

    @property
    def finished(self) -> bool:
        """Whether nothing can be added."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why it cannot be followed on, such as a limit of llguidance's; None if it can."""
        return self.matcher.get_error() if self.matcher.is_error() else None


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
        self._executor = llguidance.LLExecutor(1)
        self._compilers = ThreadPoolExecutor(2, "grammar")  # one that takes long is not alone
        self._lock = threading.Lock()
        self._made: WeakValueDictionary[str, Future[llguidance.LLMatcher | str]]
        self._made = WeakValueDictionary()
        """By text; or why it cannot be made."""
        self._latest: OrderedDict[str, Future[llguidance.LLMatcher | str]] = OrderedDict()

    def compile(self, grammar: Mapping[str, Any]) -> Future[llguidance.LLMatcher | str]:
        """Once for all who ask for it, even at the same time: it may take seconds. The latest are
        kept, and each for as long as somebody holds what this returns."""
        text = json.dumps(grammar)
        with self._lock:
            made = self._made.get(text)
            if made is None:
                made = self._made[text] = self._compilers.submit(self._compile, text)
            self._latest[text] = made
            self._latest.move_to_end(text)
            if len(self._latest) > KEPT:
                self._latest.popitem(last=False)
            return made

    def check(self, grammar: Mapping[str, Any]) -> llguidance.LLMatcher:
        """ValueError, naming the field, if it does not compile or allows no text."""
        made = self.compile(grammar).result()
        if isinstance(made, str):
            raise ValueError(made)
        return made

    def start(
        self, grammar: Mapping[str, Any], ending: Collection[int], made: Sequence[int] = ()
    ) -> GrammarState:
        """An answer that ``ending`` tokens may end, of which ``made`` is there. ValueError: see
        ``check``, or ``made`` does not follow."""
        bits = np.zeros(self._width * 32, dtype=np.uint8)
        bits[list(ending)] = 1
        words = np.packbits(bits, bitorder="little").view(np.int32)
        state = GrammarState(self.check(grammar).deep_copy(), words)
        # The token that ended the answer is not part of its text.
        if not state.feed(made[:-1] if made and made[-1] in ending else made):
            raise ValueError(f"generated: it does not follow the grammar: {state.error}")
        return state

    def _compile(self, text: str) -> llguidance.LLMatcher | str:
        ((kind, value),) = json.loads(text).items()
        matcher = llguidance.LLMatcher(self._tokenizer, _source(kind, value), log_level=0)
        if matcher.is_error():
            return f"grammar: this {kind} does not compile: {matcher.get_error().strip()}"
        if not (self._one(matcher) & ~_bit(self._end, self._width)).any():
            return f"grammar: this {kind} allows no text, or none of these tokens"
        return matcher

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
        if plain := [(matcher, at) for matcher, at, draft in placed if not draft]:
            masks.fill_next_token_bitmask_par(self._executor, plain, found)
        if drafted := [each for each in placed if each[2]]:
            masks.fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, found)
        ending = np.repeat([s.ending for s, _ in rows], np.diff(firsts), axis=0)
        may_end = (found[:, self._end // 32] >> (self._end % 32)) & 1
        found |= ending * may_end[:, None]
        bits = np.unpackbits(found.view(np.uint8), axis=1, count=self._end, bitorder="little")
        if drafted:
            # Behind a guess that ends it nothing may come, but something must be chosen.
            bits[~bits.any(axis=1)] = 1
        return bits.view(np.bool_)


def _bit(at: int, width: int) -> np.ndarray:
    bits = np.zeros(width * 32, dtype=np.uint8)
    bits[at] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _source(kind: str, value: Any) -> str:
    """A grammar as llguidance reads it."""
    assert kind in GRAMMARS, kind
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(value)
    if kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(value)
    if kind == "choice":
        either = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        return llguidance.LLMatcher.grammar_from_lark(f"start: {either}")
    schema = {"type": "object"} if kind == "json_object" else value
    return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)
