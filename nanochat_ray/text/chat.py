"""Conversations as token ids: nanochat's layout, with a mask of what the assistant is to learn.

``<|bos|> (<|user_start|> … <|user_end|> <|assistant_start|> … <|assistant_end|>)*``; inside an
assistant's turn ``<|python_start|> expression <|python_end|>`` calls the calculator, which answers
``<|output_start|> value <|output_end|>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanochat_ray.text.tokenizer import Tokenizer

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": str | parts}``; a part is
``{"type": "text" | "python" | "python_output", "text": str}`` and only assistants have parts."""

ROLES = ("system", "user", "assistant")


def _turns(messages: Sequence[Message]) -> list[Message]:
    """Checked messages, a leading system message merged into the first user's."""
    if not messages:
        raise ValueError("messages: there must be at least one")
    for i, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise ValueError(f"messages[{i}].role={message.get('role')!r}: one of {list(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) and (message["role"] != "assistant" or content is None):
            raise ValueError(f"messages[{i}].content: a text is expected, not {content!r:.60}")
    turns = list(messages)
    if turns[0]["role"] == "system":
        if len(turns) < 2 or turns[1]["role"] != "user":
            raise ValueError("messages[1].role: a user message must follow the system message")
        content = f"{turns[0]['content']}\n\n{turns[1]['content']}"
        turns = [{"role": "user", "content": content}, *turns[2:]]
    for i, message in enumerate(turns):
        wanted = ("user", "assistant")[i % 2]
        if message["role"] != wanted:
            at = i + len(messages) - len(turns)
            raise ValueError(
                f"messages[{at}].role={message['role']!r}: {wanted!r} is expected there, since "
                "user and assistant take turns"
            )
    return turns


def _assistant(tok: Tokenizer, content: Any) -> tuple[list[int], list[int]]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    ids: list[int] = []
    mask: list[int] = []
    marks = {"python": ("<|python_start|>", "<|python_end|>", 1)}
    # The calculator writes its answers itself: the model does not learn them.
    marks["python_output"] = ("<|output_start|>", "<|output_end|>", 0)
    for part in parts:
        kind, text = part.get("type"), part.get("text")
        if kind != "text" and kind not in marks:
            raise ValueError(f"content part type={kind!r}: one of text, {', '.join(marks)}")
        if not isinstance(text, str):
            raise ValueError(f"content part text={text!r:.60}: a text is expected")
        piece, learned = tok.encode(text), 1
        if kind in marks:
            start, end, learned = marks[kind]
            piece = [tok.special(start), *piece, tok.special(end)]
        ids += piece
        mask += [learned] * len(piece)
    return ids, mask


def render_conversation(tok: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids, and a mask of equal length with 1 where the assistant's own tokens stand.

    Raises ValueError for an unknown role or part, or for turns out of order.
    """
    ids, mask = [tok.bos], [0]
    for message in _turns(messages):
        if message["role"] == "user":
            piece = tok.encode(message["content"])
            ids += [tok.special("<|user_start|>"), *piece, tok.special("<|user_end|>")]
            mask += [0] * (len(piece) + 2)
        else:
            piece, learned = _assistant(tok, message["content"])
            ids += [tok.special("<|assistant_start|>"), *piece, tok.special("<|assistant_end|>")]
            mask += [0, *learned, 1]
    return ids, mask


def render_prompt(tok: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids up to where the assistant begins to speak. The last message must be a user's."""
    if messages and messages[-1].get("role") == "assistant":
        raise ValueError("messages: the last one must be a user's")
    ids, _ = render_conversation(tok, messages)
    return [*ids, tok.special("<|assistant_start|>")]
