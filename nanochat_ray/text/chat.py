"""Conversations as token ids: nanochat's layout, with a mask of what the assistant is to learn.

``<|bos|> (<|user_start|> … <|user_end|> <|assistant_start|> … <|assistant_end|>)*``; inside an
assistant's turn ``<|python_start|> expression <|python_end|>`` calls the calculator, which answers
``<|output_start|> value <|output_end|>``. A call of another function is written between the same
delimiters as ``{"name":…,"arguments":{…}}``.

nanochat's models have seen user and assistant alternate, and a system message at the head of the
first user turn. Every other order is brought into that form: a system message becomes part of the
user turn where it stands, and neighbours of one role become one turn, with a blank line between
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nanochat_ray.text.tokenizer import Tokenizer

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": str | parts}``; a part is
``{"type": "text" | "python" | "python_output", "text": str}`` and only assistants have parts. A
part with ``"weight": 0`` is not learnt."""

ROLES = ("system", "user", "assistant")
OPENAI_ROLES = (*ROLES, "developer", "tool")
TOOL_CALL = ("<|python_start|>", "<|python_end|>")
TOOL_RESULT = ("<|output_start|>", "<|output_end|>")
CALCULATOR = "calculator"
EXPRESSION = "expression"
"""The calculator's argument, where it is called as a function."""
_BLANK = "\n\n"
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class ToolDelimiters(NamedTuple):
    """Token ids around a tool call and around its result."""

    call_start: int
    call_end: int
    result_start: int
    result_end: int


def tool_delimiters(tokenizer: Tokenizer) -> ToolDelimiters:
    return ToolDelimiters(*map(tokenizer.special, TOOL_CALL + TOOL_RESULT))


# --- messages in OpenAI's form ------------------------------------------------------------------


def from_openai(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    open_calls: bool = False,
) -> list[Message]:
    """OpenAI's messages in the form of this module; ``tools`` as in a request.

    An assistant's messages and the results of its calls between them become one turn. With
    ``open_calls`` the last message may call without a result, as what is trained on does. An
    assistant's ``weight`` of 0 marks its parts. ValueError names the message that is wrong.
    """
    rendered: list[Message] = []
    pending: dict[str, Message] = {}  # calls without a result yet, by id, as the model writes them
    turn_is_open = False  # the assistant's turn continues behind a result
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        role = message.get("role")
        if role not in OPENAI_ROLES:
            raise ValueError(f"{at}.role={role!r:.40} is not allowed: one of {list(OPENAI_ROLES)}")
        text = content_text(message.get("content"), f"{at}.content")
        if role == "tool":
            call = pending.pop(message.get("tool_call_id") or "", None)
            if call is None:
                raise ValueError(
                    f"{at}.tool_call_id={message.get('tool_call_id')!r:.80} is not allowed: the id "
                    "of a call in an assistant's message before it that has no result yet"
                )
            rendered[-1]["content"] += [call, {"type": "python_output", "text": text}]
            turn_is_open = True
            continue
        if pending:
            raise ValueError(
                f"{at}.role={role!r} is not allowed: the result of the call "
                f"{next(iter(pending))!r:.80} must come first"
            )
        if role != "assistant":
            rendered.append({"role": "user" if role == "user" else "system", "content": text})
            turn_is_open = False
            continue
        weight = {"weight": 0} if message.get("weight") == 0 else {}
        parts = [{"type": "text", "text": text, **weight}] if text else []
        if turn_is_open:
            rendered[-1]["content"] += parts
        else:
            rendered.append({"role": "assistant", "content": parts})
        for k, call in enumerate(message.get("tool_calls") or ()):
            where = f"{at}.tool_calls[{k}]"
            if call["id"] in pending:
                raise ValueError(f"{where}.id={call['id']!r:.80} is not allowed: it comes twice")
            written = _call_text(call["function"], f"{where}.function")
            pending[call["id"]] = {"type": "python", "text": written, **weight}
        turn_is_open = False
    if pending and open_calls and messages[-1]["role"] == "assistant":
        rendered[-1]["content"] += pending.values()
    elif pending:
        raise ValueError(f"messages: the result of the call {next(iter(pending))!r:.80} is missing")
    if text := tools_text(tools):
        rendered.insert(
            int(bool(rendered) and rendered[0]["role"] == "system"),
            {"role": "system", "content": text},
        )
    return rendered


def content_text(content: Any, at: str) -> str:
    """A message's text; text parts are joined by line breaks, as in vLLM."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{at}={content!r:.60} is not allowed: a text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(_TEXT_PARTS[kind]) if kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise ValueError(
                f"{at}[{i}]: type {kind!r:.40} is not supported, only 'text' with its text"
            )
        texts.append(text)
    return "\n".join(texts)


def _call_text(function: Mapping[str, Any], at: str) -> str:
    name, arguments = function["name"], function["arguments"]
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(f"{at}.arguments={arguments!r:.80} is not allowed: a JSON object")
    return call_text(name, parsed)


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the model writes it: the calculator's expression, or JSON."""
    if name == CALCULATOR and isinstance(expression := arguments.get(EXPRESSION), str):
        return expression
    return (
        f"{call_prefix(name)}{json.dumps(arguments, ensure_ascii=False, separators=(',', ':'))}}}"
    )


def call_prefix(name: str) -> str:
    """How a call of ``name`` begins; its arguments and ``}`` follow."""
    return f'{{"name":{json.dumps(name, ensure_ascii=False)},"arguments":'


def is_calculator(function: Mapping[str, Any]) -> bool:
    """Whether a function of a client's is the calculator that the model has learnt."""
    if function.get("name") != CALCULATOR:
        return False
    schema = function.get("parameters")
    if not schema:
        return True
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(properties.get(EXPRESSION), dict):
        return False
    is_text = properties[EXPRESSION].get("type", "string") == "string"
    return is_text and (required is None or required in ([], [EXPRESSION]))


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """What tells the model of functions other than its calculator; "" if there are none."""
    functions = [t["function"] for t in tools if not is_calculator(t["function"])]
    if not functions:
        return ""
    lines = [
        json.dumps(
            {k: f[k] for k in ("name", "description", "parameters") if f.get(k)},
            ensure_ascii=False,
            separators=(",", ":"),
        )
        for f in functions
    ]
    return "\n".join(["Functions:", *lines])


# --- turns --------------------------------------------------------------------------------------


def _turns(messages: Sequence[Message]) -> list[Message]:
    """Checked messages as turns of "user" and "assistant", which alternate."""
    if not messages:
        raise ValueError("messages: there must be at least one")
    turns: list[Message] = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{i}].role={role!r}: one of {list(ROLES)}")
        if not isinstance(content, str) and (role != "assistant" or content is None):
            raise ValueError(f"messages[{i}].content: a text is expected, not {content!r:.60}")
        role = "assistant" if role == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = _joined(turns[-1]["content"], content)
        else:
            turns.append({"role": role, "content": content})
    return turns


def _joined(first: Any, second: Any) -> Any:
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}{_BLANK}{second}"
    parts = [*_parts(first), {"type": "text", "text": _BLANK}, *_parts(second)]
    joined: list[dict[str, Any]] = []
    for part in parts:  # neighbouring texts are tokenized as one
        if joined and joined[-1].get("type") == part.get("type") == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return joined


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _assistant(tok: Tokenizer, content: Any) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    # The engine writes the results: the model does not learn them.
    delimiters = {"python": (*TOOL_CALL, 1), "python_output": (*TOOL_RESULT, 0)}
    for part in _parts(content):
        kind, text = part.get("type"), part.get("text")
        if kind != "text" and kind not in delimiters:
            raise ValueError(f"content part type={kind!r}: one of text, {', '.join(delimiters)}")
        if not isinstance(text, str):
            raise ValueError(f"content part text={text!r:.60}: a text is expected")
        piece, learned = tok.encode(text), 1
        if kind in delimiters:
            start, end, learned = delimiters[kind]
            piece = [tok.special(start), *piece, tok.special(end)]
        ids += piece
        mask += [learned if part.get("weight", 1) else 0] * len(piece)
    return ids, mask


def render_conversation(tok: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids, and a mask of equal length with 1 where the assistant's own tokens stand.

    Raises ValueError for an unknown role or part.
    """
    ids, mask = [tok.bos], [0]
    for turn in _turns(messages):
        if turn["role"] == "user":
            piece = tok.encode(turn["content"])
            ids += [tok.special("<|user_start|>"), *piece, tok.special("<|user_end|>")]
            mask += [0] * (len(piece) + 2)
        else:
            piece, learned = _assistant(tok, turn["content"])
            ids += [tok.special("<|assistant_start|>"), *piece, tok.special("<|assistant_end|>")]
            parts = _parts(turn["content"])
            mask += [0, *learned, 1 if not parts or parts[-1].get("weight", 1) else 0]
    return ids, mask


def render_prompt(
    tok: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """Ids up to where the model begins to write, with transformers' and vLLM's two switches.

    By default that is a new turn of the assistant's, or the open turn whose last part is a tool's
    result. ``continue_final_message`` leaves the last message open, which must then be the
    assistant's, so that the answer continues it.
    """
    ids, _ = render_conversation(tok, messages)
    last = messages[-1]
    is_assistant = last["role"] == "assistant"
    if continue_final_message and not is_assistant:
        raise ValueError(
            f"messages[{len(messages) - 1}].role={last['role']!r} is not allowed with "
            "continue_final_message: 'assistant'"
        )
    parts = _parts(last["content"]) if is_assistant else []
    if continue_final_message or (parts and parts[-1]["type"] == "python_output"):
        return ids[:-1]
    return [*ids, tok.special("<|assistant_start|>")] if add_generation_prompt else ids
