"""Log-probabilities in OpenAI's two forms, of chats and of completions, and in vLLM's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.serve.generation import LogprobPair
from nanochat_ray.serve.openai.schema import outputs
from nanochat_ray.text.tokenizer import Tokenizer

OptionalLogprob = tuple[int, TokenLogprob | None]
"""A token and its log-probabilities, None for the first token of a prompt."""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The token's text; OpenAI's ``bytes:\\xe2\\x82`` if it is only part of a character."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def for_chat(tokenizer: Tokenizer, tokens: Sequence[LogprobPair]) -> outputs.ChatLogprobs:
    def entry(token: int, logprob: float) -> outputs.TopLogprob:
        raw = list(tokenizer.decode_bytes([token]))
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": raw}

    content: list[outputs.TokenLogprob] = [
        {**entry(token, scores.logprob), "top_logprobs": [entry(*pair) for pair in scores.top]}
        for token, scores in tokens
    ]
    return {"content": content, "refusal": None}


class TextOffsets:
    """Where tokens begin in their text, in characters. Counted by the tokens themselves: text may
    still be pending when the log-probabilities of its tokens are sent."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._offset = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, token: int) -> int:
        """The token's offset; the next token begins after it."""
        offset = self._offset
        self._offset += len(self._decoder.decode(self._tokenizer.decode_bytes([token])))
        return offset


def for_completion(
    tokenizer: Tokenizer, tokens: Sequence[OptionalLogprob], offsets: TextOffsets
) -> outputs.CompletionLogprobs:
    """``offsets`` has seen the tokens before these."""

    def top(token: int, scores: TokenLogprob) -> dict[str, float]:
        # The sampled token is always among them, as at OpenAI.
        pairs = (*scores.top, (token, scores.logprob))
        return {token_text(tokenizer, t): logprob for t, logprob in pairs}

    return {
        "tokens": [token_text(tokenizer, token) for token, _ in tokens],
        "token_logprobs": [None if s is None else s.logprob for _, s in tokens],
        "top_logprobs": [None if s is None else top(token, s) for token, s in tokens],
        "text_offset": [offsets.next(token) for token, _ in tokens],
    }


def for_prompt(
    tokenizer: Tokenizer, tokens: Sequence[OptionalLogprob], count: int
) -> list[dict[str, outputs.PromptLogprob] | None]:
    """vLLM's form: by token id, the prompt's own token and the ``count`` likeliest ones."""
    entries: list[dict[str, outputs.PromptLogprob] | None] = []
    for token, entry in tokens:
        if entry is None:
            entries.append(None)
            continue
        ranks: dict[int, tuple[float, int | None]] = {
            t: (x, k + 1) for k, (t, x) in enumerate(entry.top)
        }
        rows = dict(list(ranks.items())[:count])
        rows[token] = ranks.get(token, (entry.logprob, None))
        entries.append(
            {
                str(t): {"logprob": x, "rank": rank, "decoded_token": token_text(tokenizer, t)}
                for t, (x, rank) in rows.items()
            }
        )
    return entries
