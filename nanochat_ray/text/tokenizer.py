"""Text to token ids and back: a byte-level BPE that rustbpe trains and tiktoken runs.

The file is JSON: token bytes in rank order (base64), the split pattern and the special tokens.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tiktoken

from nanochat_ray.storage import Store

FOLDER = "tokenizers"
"""Of a storage root."""
SPECIAL_TOKENS = (
    "<|bos|>",  # before every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # and is answered
    "<|output_end|>",
)

# GPT-4's split (tiktoken's cl100k_base) with one change of nanochat's: numbers fall into groups of
# one or two digits instead of three, which spends less of a small vocabulary on them.
SPLIT_PATTERN = "|".join(
    (
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",
        r"\p{N}{1,2}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s+",
    )
)

MAX_WHITE_SPACE = 999_000
"""Longest run of white space that the split pattern can match: it searches each run for a line's
end and keeps one state a character, of which the regular expression engine allows a million."""
# What Rust's \s matches; Python's has four control characters more.
_WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


def _boundaries(text: str) -> list[int]:
    """Offsets that divide a text before the split pattern is applied: only inside of long runs.

    The text before and after a run is split as in the whole text, since the pattern looks ahead no
    further than one character after a run.
    """
    if len(text) <= MAX_WHITE_SPACE:
        return []
    return [
        at
        for run in _WHITE_SPACE.finditer(text)
        if run.end() - run.start() > MAX_WHITE_SPACE
        for at in range(run.start() + MAX_WHITE_SPACE, run.end(), MAX_WHITE_SPACE)
    ]


def folder_of(root: Store, fingerprint: str) -> Store:
    """The folder of a tokenizer: the first 16 digits of its fingerprint name it."""
    return root.child(FOLDER, fingerprint[:16])


class Tokenizer:
    """Immutable; safe to share between threads. Special tokens have the last nine ids.

    ``encode`` never yields a special token, whatever the text holds: those come only from
    ``special`` and from ``text.chat``.
    """

    def __init__(self, ranks: Sequence[bytes], pattern: str = SPLIT_PATTERN):
        missing = {bytes([b]) for b in range(256)} - set(ranks)
        if missing or len(set(ranks)) != len(ranks):
            raise ValueError("tokenizer: every byte must be a token, and no token may occur twice")
        self.ranks = tuple(ranks)
        self.pattern = pattern
        self.specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            name="nanochat_ray",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=self.specials,
        )
        # tiktoken's own decoding releases the GIL, for which a server's threads then compete: for
        # one token at a time that was a fifth of the event loop's time.
        self._bytes = dict(enumerate(ranks))
        self._bytes |= {token: name.encode() for name, token in self.specials.items()}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """BPE on ``texts``, ``vocab_size`` counting bytes and specials; smaller if text runs out.

        Raises ValueError if ``vocab_size`` leaves no room for every byte and special token.
        """
        import rustbpe

        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise ValueError(f"vocab_size={vocab_size} is not allowed: {least} or more")
        trainer = rustbpe.Tokenizer()
        try:
            trainer.train_from_iterator(
                iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN
            )
        except BaseException as error:
            # A panic of Rust is no Exception: no handler would report it.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer cannot be trained: {error}") from None
        pairs = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in pairs])

    @classmethod
    def bytes_only(cls) -> Tokenizer:
        """One token for each byte: needs no training, for tests and odd data."""
        return cls([bytes([b]) for b in range(256)])

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + len(self.specials)

    @property
    def bos(self) -> int:
        return self.specials["<|bos|>"]

    def special(self, name: str) -> int:
        return self.specials[name]

    def encode(self, text: str) -> list[int]:
        """Token ids of any text; a lone surrogate becomes U+FFFD, as in ``decode``.

        A run of white space longer than ``MAX_WHITE_SPACE`` is encoded in several chunks.
        ValueError if the split pattern, a foreign one, cannot split the text.
        """
        boundaries = _boundaries(text)
        if not boundaries:
            return self._encode_chunk(text)
        chunks = itertools.pairwise([0, *boundaries, len(text)])
        return [token for a, b in chunks for token in self._encode_chunk(text[a:b])]

    def _encode_chunk(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # A panic of Rust is no Exception: no handler would report it.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"a text of {len(text)} characters cannot be split by pattern={self.pattern!r:.200}"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the tokens; ids beyond the vocabulary have none (a model may be padded). An
        array or tensor of ids has one dimension."""
        text = self._bytes
        if hasattr(ids, "tolist"):  # the elements of a tensor equal no int as keys
            ids = ids.tolist()
        return b"".join([text.get(token, b"") for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text; bytes that are no UTF-8 (half a character, say) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def byte_table(self) -> list[bytes]:
        """The bytes of each token, ``vocab_size`` of them; empty for specials."""
        return [*self.ranks, *[b""] * len(self.specials)]

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each token stands for, int32 ``[vocab_size]``; 0 for specials."""
        lengths = [len(token) for token in self.ranks] + [0] * len(self.specials)
        return np.asarray(lengths, dtype=np.int32)

    def to_json(self) -> str:
        """Canonical: equal tokenizers give equal text."""
        return json.dumps(
            {
                "format": "nanochat_ray tokenizer 1",
                "pattern": self.pattern,
                "specials": list(SPECIAL_TOKENS),
                "tokens": [base64.b64encode(token).decode() for token in self.ranks],
            },
            indent=0,
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Raises ValueError if ``text`` is not what ``to_json`` writes."""
        try:
            values = json.loads(text)
            if values["format"] != "nanochat_ray tokenizer 1":
                raise ValueError(f"its format is {repr(values['format'])[:60]}")
            if tuple(values["specials"]) != SPECIAL_TOKENS:
                raise ValueError(f"its special tokens are {repr(values['specials'])[:120]}")
            tokens = [base64.b64decode(token, validate=True) for token in values["tokens"]]
            return cls(tokens, values["pattern"])
        except RecursionError:
            raise ValueError("tokenizer.json cannot be read: it is nested too deep") from None
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"tokenizer.json cannot be read: {reason:.200}") from None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, store: Store) -> None:
        store.write_text("tokenizer.json", self.to_json())

    @classmethod
    def load(cls, store: Store, fingerprint: str | None = None) -> Tokenizer:
        """The tokenizer of a folder, which must have the ``fingerprint`` if one is given.

        Raises ValueError, naming the file, if it is missing, damaged or another one.
        """
        where = f"{store.uri}/tokenizer.json"
        try:
            data = store.read_bytes("tokenizer.json")
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error}") from None
        # A fingerprint is the hash of the file, so no altered file is even parsed.
        digest = hashlib.sha256(data).hexdigest()
        if fingerprint is not None and digest != fingerprint:
            raise ValueError(
                f"{where} is damaged or another tokenizer: its SHA-256 is {digest[:16]}…, "
                f"expected is {fingerprint[:16]}…"
            )
        try:
            return cls.from_json(data.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text (byte {error.start})") from None
        except ValueError as error:
            raise ValueError(f"{store.uri}: {error}") from None

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[tuple[bytes, ...], str]]:
        # Ray ships tokenizers between its own processes; tiktoken's part is built anew there.
        return Tokenizer, (self.ranks, self.pattern)
