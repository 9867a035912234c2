"""Token ids to text and typed events as they come.

``IncrementalDetokenizer`` decodes text: no character is split, and stop strings match across token
borders. ``OutputProcessor`` also interprets the delimiters of tools and emits events.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanochat_ray.text.chat import tool_delimiters
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass(slots=True)
class TextEvent:
    """Text that one token adds: "" while a character or a possible stop string is incomplete."""

    text: str


@dataclass(slots=True)
class ToolCallEvent:
    """Text of a call between its delimiters; ``is_complete`` once the end delimiter has come."""

    text: str
    is_complete: bool


@dataclass(slots=True)
class ToolResultEvent:
    """A call that the engine executed, and its result."""

    call: str
    result: str


Event = TextEvent | ToolCallEvent | ToolResultEvent


class IncrementalDetokenizer:
    """Text, decoded as its tokens come, none of which is a special one.

    Bytes wait until they form a character; text is held back only while it may be a prefix of a
    stop string. However the tokens are split into calls of ``push``, the joined text is the same.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""
        self.is_stopped = False
        """A stop string was matched: the request can be aborted, and no more text comes."""

    def push(self, tokens: Iterable[int], may_stop: bool = True) -> str:
        """New text after ``tokens``. Stop strings end the text only if ``may_stop``."""
        if self.is_stopped:
            return ""
        return self._emit(self._decoder.decode(self._tokenizer.decode_bytes(tokens)), may_stop)

    def flush(self) -> str:
        """Text that was still pending; call it once, after the last token."""
        if self.is_stopped:
            return ""
        text = self._emit(self._decoder.decode(b"", final=True))
        rest, self._pending = self._pending, ""
        return text if self.is_stopped else text + rest

    def _emit(self, new: str, may_stop: bool = True) -> str:
        text = self._pending + new
        if not self._stop:
            return text
        # The stop string that is complete first ends the text, wherever the tokens were split.
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends and may_stop:
            self.is_stopped, self._pending = True, ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class OutputProcessor:
    """Turns the token ids of one answer into events.

    Special tokens have no text. Tokens between the delimiters of a call or a result become one
    event when the end delimiter comes. In an answer that begins inside a call
    (``begins_in_call``: the start delimiter is the last token of the prompt), ``streams_call``
    emits the text of the call as it comes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        begins_in_call: bool = False,
        streams_call: bool = False,
    ):
        """Stop strings match from the token after the first ``min_tokens`` on, as in vLLM."""
        self._tokenizer = tokenizer
        self._delimiters = tool_delimiters(tokenizer)
        self._special = frozenset(tokenizer.specials.values())
        self._min_tokens, self._num_tokens = min_tokens, 0
        self._text = IncrementalDetokenizer(tokenizer, stop)
        self._call_text = IncrementalDetokenizer(tokenizer) if streams_call else None
        self._inside = self._delimiters.call_start if begins_in_call else -1
        """The start delimiter that has no end delimiter yet; -1 outside of tools."""
        self._pending: list[int] = []
        self._call = ""

    @property
    def is_stopped(self) -> bool:
        """A stop string has ended the answer."""
        return self._text.is_stopped

    def push(self, token: int) -> Sequence[Event]:
        self._num_tokens += 1
        if token in self._special:
            return self._on_special(token)
        if self._call_text is not None:
            return (ToolCallEvent(self._call_text.push((token,)), is_complete=False),)
        if self._inside >= 0:
            self._pending.append(token)
            return ()
        may_stop = self._num_tokens > self._min_tokens
        return (TextEvent(self._text.push((token,), may_stop)),)

    def flush(self) -> list[Event]:
        """Text that was still pending; call it once, after the last token."""
        events: list[Event] = [TextEvent(self._text.flush())]
        if self._call_text is not None:
            events.append(ToolCallEvent(self._call_text.flush(), is_complete=False))
        return events

    def _on_special(self, token: int) -> list[Event]:
        events: list[Event] = []
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        ids, start = self._delimiters, self._inside
        self._inside = token if token in (ids.call_start, ids.result_start) else -1
        if token == ids.call_end:
            self._call = text
            if start == ids.call_start and self._call_text is None:
                events.append(ToolCallEvent(text, is_complete=True))
        elif token == ids.result_end and start == ids.result_start:
            events.append(ToolResultEvent(self._call, text))
        if self._call_text is not None:
            events.append(ToolCallEvent("", is_complete=True))
        return events
