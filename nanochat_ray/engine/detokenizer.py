"""Token ids to text as they come: no split characters, and stop strings across token borders."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from nanochat_ray.engine.request import Output
from nanochat_ray.text.tokenizer import Tokenizer

_TOOL_FRAMES = (("<|python_start|>", "<|python_end|>"), ("<|output_start|>", "<|output_end|>"))


class IncrementalDetokenizer:
    """The text of one answer, piece by piece.

    Bytes wait until they make a whole character; text waits only as far as it may be the
    beginning of a stop string. Special tokens have no text, and what stands between a tool's
    marks is left out unless ``show_tools``. However the tokens are cut into pieces, the joined
    text is the same.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), show_tools: bool = False):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._special = frozenset(tokenizer.specials.values())
        frames = () if show_tools else _TOOL_FRAMES
        self._closes = {tokenizer.special(a): tokenizer.special(b) for a, b in frames}
        self._hidden_until: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False
        """A stop string was met: the request can be aborted, and no more text comes."""

    def add(self, output: Output) -> str:
        """New text after one step; all that is left if the request has finished with it."""
        tokens = output.tokens
        if output.ended_by_last:
            tokens = tokens[:-1]  # the token that ended the answer is no part of its text
        text = self.push(tokens)
        return text if output.finish is None else text + self.flush()

    def push(self, tokens: Iterable[int], may_stop: bool = True) -> str:
        """New text after ``tokens``; no stop string that is complete with them ends it unless
        ``may_stop``."""
        if self.stopped:
            return ""
        visible = [token for token in tokens if self._visible(token)]
        return self._emit(self._decoder.decode(self._tokenizer.decode_bytes(visible)), may_stop)

    def flush(self) -> str:
        """What was held back; call it once, after the last token."""
        if self.stopped:
            return ""
        text = self._emit(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _visible(self, token: int) -> bool:
        if self._hidden_until is not None:
            if token == self._hidden_until:
                self._hidden_until = None
            return False
        self._hidden_until = self._closes.get(token)
        return token not in self._special

    def _emit(self, new: str, may_stop: bool = True) -> str:
        text = self._held + new
        if not self._stop:
            return text
        # The string that is complete first ends the text, wherever the pieces were cut.
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends and may_stop:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop`` but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
