"""Structured outputs that end in time: near the token limit the shortest path to a valid end.

A weak model may continue a string or a list up to its token limit, and then its JSON is invalid.
From time to time a greedy search finds the shortest path to an end; when it would soon not fit any
more, the output is steered along it. The times of the searches depend only on the tokens and the
limit, so that a request that is preempted or moved is steered the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import llguidance
import numpy as np

HORIZON = 512
"""Remaining tokens at which the searches start."""
MIN_SLACK, MAX_SLACK = 6, 32
"""Remaining tokens beside the shortest path, below which the output is steered: the lower bound,
and the upper bound of a quarter of the remaining tokens. One token may lengthen the path by as much
as a whole item of a list; where that has happened, the slack is at least as large."""
_OUTSIDE = ("}]", ",", '"', "0123456789", ":tfn", "[", "{", "-.eE")
_INSIDE = ('"', "0123456789abcdefghijklmnopqrstuvwxyz_", " ", "\\")
"""First bytes of tokens outside and inside of a string, in the order of how soon they close."""


class Preferences:
    """For each token how soon it closes JSON: float64 ``[V]``, lower is sooner. Among equals a
    longer token is better, since it contains more of what is needed anyway."""

    def __init__(self, tokens: Sequence[bytes]):
        self.tokens = tokens
        self.outside, self.inside = _ranks(tokens, _OUTSIDE), _ranks(tokens, _INSIDE)
        self.comma = next((i for i, token in enumerate(tokens) if token == b","), None)


def _ranks(tokens: Sequence[bytes], order: Sequence[str]) -> np.ndarray:
    first = {ord(c): float(i) for i, chars in enumerate(order) for c in chars}
    other, none = len(order) - 1.5, len(order) + 1.0
    return np.array([first.get(t[0], other) - min(len(t), 40) / 100 if t else none for t in tokens])


@dataclass(frozen=True)
class Quotes:
    """The end of a JSON text: inside of a string or not, behind a backslash or not."""

    inside: bool = False
    is_escape: bool = False

    def after(self, text: bytes) -> Quotes:
        inside, is_escape = self.inside, self.is_escape
        for byte in text:
            if is_escape:
                is_escape = False
            elif byte == 0x22:  # "
                inside = not inside
            else:
                is_escape = inside and byte == 0x5C  # a backslash
        return Quotes(inside, is_escape)


@dataclass
class Ending:
    """Steers one output of at most ``limit`` tokens to its end."""

    limit: int
    preferences: Preferences
    next_mask: Callable[[llguidance.LLMatcher], np.ndarray]
    """bool ``[V]`` of the tokens that a matcher allows next."""
    path: list[int] | None = None
    """The tokens that the output must follow, and then end; None while it is not steered."""
    quotes: Quotes = Quotes()
    _growth: int = 0
    """By how much the slack has shrunk from one search to the next, at most."""
    _end: int = 0
    _num_tokens: int = 0
    _next_look: int = field(init=False)
    """Remaining tokens at which the next search happens."""

    def __post_init__(self) -> None:
        self._next_look = min(self.limit, HORIZON)

    @property
    def free(self) -> int:
        """Draft tokens that fit before the next search; one more token is sampled behind them."""
        return 0 if self.path is not None else max(0, self._remaining - self._next_look - 1)

    @property
    def _remaining(self) -> int:
        return self.limit - self._num_tokens

    def feed(self, token: int, matcher: llguidance.LLMatcher) -> None:
        """Appends a token of the output, which ``matcher`` has consumed."""
        self._num_tokens += 1
        self.quotes = self.quotes.after(self.preferences.tokens[token])
        if self.path is not None:
            if self.path and self.path[0] == token:
                del self.path[0]
                return
            # It was sampled behind draft tokens, before the path was known: search again.
            self.path, self._next_look = None, self._remaining
        self.look(matcher)

    def look(self, matcher: llguidance.LLMatcher) -> None:
        """Searches, if it is time to, and decides whether the output is steered from here."""
        remaining = self._remaining
        if remaining > self._next_look or remaining <= 0:
            return
        path = self._shortest(matcher, remaining)
        if path is None:
            self._next_look = remaining // 2
            return
        # Remaining tokens behind the shortest path: each token that is not on it takes 1 or more.
        end = remaining - len(path)
        self._growth = max(self._growth, self._end - end, self._next_item(matcher, len(path)))
        self._end = end
        least = max(MIN_SLACK, self._growth + 2, min(MAX_SLACK, remaining // 4))
        slack = end - 1  # 1: the stop token
        if 0 <= slack <= least:
            self.path = path
        self._next_look = remaining - max(1, (slack - least - MAX_SLACK) // 4)

    def _next_item(self, matcher: llguidance.LLMatcher, length: int) -> int:
        """By how much the shortest path, of ``length`` tokens, grows with one more list item."""
        comma = self.preferences.comma
        if comma is None or self.quotes.inside or not self.next_mask(matcher)[comma]:
            return 0
        matcher = matcher.deep_copy()
        matcher.consume_token(comma)
        path = self._shortest(matcher, self._remaining)
        return self._remaining if path is None else len(path) + 1 - length

    def _shortest(self, matcher: llguidance.LLMatcher, most: int) -> list[int] | None:
        matcher, quotes = matcher.deep_copy(), self.quotes
        path: list[int] = []
        while not matcher.is_accepting() and not matcher.is_stopped():
            mask = self.next_mask(matcher)
            if len(path) >= most or matcher.is_error() or not mask.any():
                return None
            ranks = self.preferences.inside if quotes.inside else self.preferences.outside
            token = int(np.where(mask, ranks, np.inf).argmin())
            matcher.consume_token(token)
            quotes = quotes.after(self.preferences.tokens[token])
            path.append(token)
        return None if matcher.is_error() else path
