"""Structured answers that end in time: near the token limit the shortest way to a valid end.

A weak model may write a string or a list until it is cut, and then its JSON is none. From time to
time the shortest end from here is looked for, greedily; where it would soon not fit any more, the
answer is held to it. When to look hangs on the answer's tokens and limit alone, so that an answer
that is preempted or moved is steered the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import llguidance
import numpy as np

HORIZON = 512
"""Tokens before the limit from which on ends are looked for."""
MIN_SLACK, MAX_SLACK = 6, 32
"""Tokens that must be left beside the shortest end, else the answer is held to it: the lower bound,
and the upper one of a quarter of what is left. One token may make the end longer by as much as a
whole item of a list, so where that was seen, as much is kept."""
_OUTSIDE = ("}]", ",", '"', "0123456789", ":tfn", "[", "{", "-.eE")
_INSIDE = ('"', "0123456789abcdefghijklmnopqrstuvwxyz_", " ", "\\")
"""First bytes of tokens outside and inside of a string, those that close soonest first."""


class Preferences:
    """For each token, how soon it closes JSON: float64 ``[V]``, lower is sooner. Among equals a
    longer token is better, since it writes more of what must be written anyway."""

    def __init__(self, tokens: Sequence[bytes]):
        self.tokens = tokens
        self.outside, self.inside = _ranked(tokens, _OUTSIDE), _ranked(tokens, _INSIDE)
        self.comma = next((i for i, token in enumerate(tokens) if token == b","), None)


def _ranked(tokens: Sequence[bytes], order: Sequence[str]) -> np.ndarray:
    first = {ord(c): float(i) for i, chars in enumerate(order) for c in chars}
    other, none = len(order) - 1.5, len(order) + 1.0
    return np.array([first.get(t[0], other) - min(len(t), 40) / 100 if t else none for t in tokens])


@dataclass(frozen=True)
class Quotes:
    """Where JSON text stands: inside of a string or not, behind a backslash or not."""

    inside: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> Quotes:
        inside, escaped = self.inside, self.escaped
        for byte in text:
            if escaped:
                escaped = False
            elif byte == 0x22:  # "
                inside = not inside
            else:
                escaped = inside and byte == 0x5C  # a backslash
        return Quotes(inside, escaped)


@dataclass
class Ending:
    """The end of one answer of at most ``limit`` tokens."""

    limit: int
    preferences: Preferences
    allowed: Callable[[llguidance.LLMatcher], np.ndarray]
    """bool ``[V]`` of the tokens that a matcher allows next."""
    path: list[int] | None = None
    """The tokens that the answer is held to, then it may end; None while it is free."""
    quotes: Quotes = Quotes()
    _growth: int = 0
    """By how much the end has come closer from one look to the next, at most."""
    _end: int = 0
    _num_tokens: int = 0
    _next_look: int = field(init=False)
    """The tokens left at which the shortest end is looked for again."""

    def __post_init__(self) -> None:
        self._next_look = min(self.limit, HORIZON)

    @property
    def free(self) -> int:
        """Draft tokens that may be taken before the next look; one more is chosen behind them."""
        return 0 if self.path is not None else max(0, self._left - self._next_look - 1)

    @property
    def _left(self) -> int:
        return self.limit - self._num_tokens

    def feed(self, token: int, matcher: llguidance.LLMatcher) -> None:
        """The answer has one more token, behind which ``matcher`` stands."""
        self._num_tokens += 1
        self.quotes = self.quotes.after(self.preferences.tokens[token])
        if self.path is not None:
            if self.path and self.path[0] == token:
                del self.path[0]
                return
            # Chosen behind draft tokens, before the path was known: look again from here.
            self.path, self._next_look = None, self._left
        self.look(matcher)

    def look(self, matcher: llguidance.LLMatcher) -> None:
        """Decides, if it is time to, whether the answer is held to its end from here."""
        left = self._left
        if left > self._next_look or left <= 0:
            return
        path = self._shortest(matcher, left)
        if path is None:
            self._next_look = left // 2
            return
        # Tokens left after the shortest end: each that does not lead there takes 1 and more.
        end = left - len(path)
        self._growth = max(self._growth, self._end - end, self._next_item(matcher, len(path)))
        self._end = end
        least = max(MIN_SLACK, self._growth + 2, min(MAX_SLACK, left // 4))
        slack = end - 1  # 1: the token that ends the answer
        if 0 <= slack <= least:
            self.path = path
        self._next_look = left - max(1, (slack - least - MAX_SLACK) // 4)

    def _next_item(self, matcher: llguidance.LLMatcher, length: int) -> int:
        """By how much the shortest end, of ``length`` tokens here, grows with one more item."""
        comma = self.preferences.comma
        if comma is None or self.quotes.inside or not self.allowed(matcher)[comma]:
            return 0
        matcher = matcher.deep_copy()
        matcher.consume_token(comma)
        path = self._shortest(matcher, self._left)
        return self._left if path is None else len(path) + 1 - length

    def _shortest(self, matcher: llguidance.LLMatcher, most: int) -> list[int] | None:
        matcher, quotes = matcher.deep_copy(), self.quotes
        path: list[int] = []
        while not matcher.is_accepting() and not matcher.is_stopped():
            allowed = self.allowed(matcher)
            if len(path) >= most or matcher.is_error() or not allowed.any():
                return None
            ranks = self.preferences.inside if quotes.inside else self.preferences.outside
            token = int(np.where(allowed, ranks, np.inf).argmin())
            matcher.consume_token(token)
            quotes = quotes.after(self.preferences.tokens[token])
            path.append(token)
        return None if matcher.is_error() else path
