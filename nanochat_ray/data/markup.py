"""The text of an HTML page, as a reader would see it."""

from __future__ import annotations

import codecs
import re
from html.parser import HTMLParser

from nanochat_ray.data.decoding import decode, encoding_of

_HIDDEN = {"script", "style", "template", "noscript", "svg", "head", "iframe", "object"}
_BLOCK_TAGS = (
    "address article aside blockquote br dd details dialog div dl dt fieldset figcaption "
    "figure footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre section summary "
    "table tbody td tfoot th thead title tr ul "
)
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "ul", "ol", "table"}


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self._hidden_tags: list[str] = []
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._hidden_tags.append(tag)
        elif tag == "body":
            self._hidden_tags.clear()  # a head that was never closed
        elif tag == "pre":
            self._pre += 1
        self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden_tags:
            while self._hidden_tags.pop() != tag:
                pass
        elif tag == "pre":
            self._pre = max(0, self._pre - 1)
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden_tags or not data:
            return
        if not self._pre:
            # Line ends of ``pre`` stay; elsewhere white space is one space, none begins a line.
            data = re.sub(r"\s+", " ", data)
            if not self.out or self.out[-1].endswith((" ", "\n")):
                data = data.removeprefix(" ")
        if data:
            self.out.append(data)

    def _break(self, tag: str) -> None:
        if tag in _BLOCKS and not self._hidden_tags:
            self.out.append("\n\n" if tag in _PARAGRAPHS else "\n")


def text_of(page: str) -> str:
    """The visible text of ``page``, blocks on lines of their own.

    Broken markup is read as well as it can be; ValueError where Python's parser cannot.
    """
    parser = _Text()
    try:
        parser.feed(page)
        parser.close()
    except AssertionError as error:  # Python's parser has some of its own for odd declarations
        raise ValueError(f"HTML that cannot be parsed: {error}") from None
    lines = [line.rstrip() for line in "".join(parser.out).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def decode_page(data: bytes, where: str) -> str:
    """The characters of a page, which may name its encoding in a ``meta`` near its start."""
    charset = re.search(rb"""<meta[^>]+charset=["']?([\w-]+)""", data[:2048], re.IGNORECASE)
    if charset is None or encoding_of(data) != "utf-8-sig":
        return decode(data, where)
    try:
        codec = codecs.lookup(charset[1].decode())
        return data.decode(codec.name)
    except (LookupError, ValueError):
        return decode(data, where)
