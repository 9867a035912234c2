"""Log-probabilities in OpenAI's two forms: one for chat, an older one for completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.serve.generation import LogprobPair
from nanochat_ray.text.tokenizer import Tokenizer


def _name(tokenizer: Tokenizer, token: int) -> str:
    """The token's text; OpenAI's ``bytes:\\xe2\\x82`` if it is no whole text by itself."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def for_chat(tokenizer: Tokenizer, scored: Sequence[LogprobPair]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = list(tokenizer.decode_bytes([token]))
        return {"token": _name(tokenizer, token), "logprob": logprob, "bytes": raw}

    content = [
        {**entry(token, found.logprob), "top_logprobs": [entry(*pair) for pair in found.top]}
        for token, found in scored
    ]
    return {"content": content, "refusal": None}


class TextOffsets:
    """Where tokens begin in their text, in characters. Counted by the tokens themselves: text may
    be held back while the scores of its tokens are shown already."""

    def __init__(self, tokenizer: Tokenizer, hidden: int = 0):
        """The first ``hidden`` tokens stand for no text."""
        self._tokenizer, self._hidden, self._offset = tokenizer, hidden, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def after(self, token: int) -> int:
        """The token's offset; the next one begins behind it."""
        offset = self._offset
        if self._hidden > 0:
            self._hidden -= 1
        else:
            self._offset += len(self._decoder.decode(self._tokenizer.decode_bytes([token])))
        return offset


def for_completion(
    tokenizer: Tokenizer,
    scored: Sequence[tuple[int, TokenLogprob | None]],
    offsets: TextOffsets,
) -> dict[str, list[Any]]:
    """``offsets`` knows the tokens before these. A prompt's very first token has None."""
    return {
        "tokens": [_name(tokenizer, token) for token, _ in scored],
        "token_logprobs": [found and found.logprob for _, found in scored],
        "top_logprobs": [
            # The chosen token is always among them, as OpenAI has it.
            found and {_name(tokenizer, t): x for t, x in (*found.top, (token, found.logprob))}
            for token, found in scored
        ],
        "text_offset": [offsets.after(token) for token, _ in scored],
    }


def for_prompt(
    tokenizer: Tokenizer, scored: Sequence[tuple[int, TokenLogprob | None]], count: int
) -> list[dict[str, Any] | None]:
    """vLLM's form: by token id, the prompt's own and the ``count`` likeliest. A token whose place
    among all is not known has no rank."""
    entries: list[dict[str, Any] | None] = []
    for token, found in scored:
        if found is None:
            entries.append(None)
            continue
        ranks: dict[int, tuple[float, int | None]] = {
            t: (x, k + 1) for k, (t, x) in enumerate(found.top)
        }
        shown = dict(list(ranks.items())[:count])
        shown[token] = ranks.get(token, (found.logprob, None))
        entries.append(
            {
                str(t): {"logprob": x, "rank": rank, "decoded_token": _name(tokenizer, t)}
                for t, (x, rank) in shown.items()
            }
        )
    return entries
