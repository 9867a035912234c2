"""The chat template: conversations as token ids in nanochat's layout, and the loss mask.

``<|bos|> (<|user_start|> … <|user_end|> <|assistant_start|> … <|assistant_end|>)*``; inside an
assistant's turn ``<|python_start|> expression <|python_end|>`` calls the calculator, which answers
``<|output_start|> value <|output_end|>``. A call of another function is written between the same
delimiters as ``{"name":…,"arguments":{…}}``.

nanochat trains on turns of user and assistant that alternate, with a system message at the start of
the first user turn. Other orders are converted to that form: a system message becomes part of the
user turn where it stands, and neighbours of one role become one turn, joined by a blank line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nanochat_ray.text.tokenizer import Tokenizer

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": str | parts}``; a part is
``{"type": "text" | "python" | "python_output", "text": str}`` and only assistants have parts. A
part with ``"weight": 0`` has no loss."""

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
    paths: Sequence[str] = (),
    open_calls: bool = False,
) -> list[Message]:
    """OpenAI's messages in the form of this module; ``tools`` as in a request.

    An assistant's messages and the results of its calls between them become one turn. With
    ``open_calls`` the last message may call without a result, as what is trained on does. An
    assistant's ``weight`` of 0 marks its parts. ValueError names the message that is wrong, by
    ``paths[i]`` or as ``messages[i]``.
    """
    conversation = _OpenAIConversation()
    for i, message in enumerate(messages):
        conversation.add(message, paths[i] if paths else f"messages[{i}]")
    conversation.end(may_call=open_calls and bool(messages) and messages[-1]["role"] == "assistant")
    result = conversation.messages
    if text := tools_text(tools):
        at = int(bool(result) and result[0]["role"] == "system")
        result.insert(at, {"role": "system", "content": text})
    return result


class _OpenAIConversation:
    """OpenAI's messages, converted one by one."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._pending: dict[str, Message] = {}
        """Calls without a result yet, by id, as the model writes them."""
        self._turn_is_open = False
        """Whether the assistant's turn continues after a result."""

    def add(self, message: Mapping[str, Any], at: str) -> None:
        role = message.get("role")
        if role not in OPENAI_ROLES:
            raise ValueError(f"{at}.role={role!r:.40} is not allowed: one of {list(OPENAI_ROLES)}")
        text = content_text(message.get("content"), f"{at}.content")
        if role == "tool":
            self._add_result(message.get("tool_call_id"), text, at)
            return
        if self._pending:
            raise ValueError(
                f"{at}.role={role!r} is not allowed: the result of the call "
                f"{next(iter(self._pending))!r:.80} must come first"
            )
        if role == "assistant":
            self._add_assistant(message, text, at)
        else:
            role = "user" if role == "user" else "system"
            self.messages.append({"role": role, "content": text})
        self._turn_is_open = False

    def _add_result(self, call_id: Any, text: str, at: str) -> None:
        call = self._pending.pop(call_id, None) if isinstance(call_id, str) else None
        if call is None:
            raise ValueError(
                f"{at}.tool_call_id={call_id!r:.80} is not allowed: the id of a call in an "
                "assistant's message before it that has no result yet"
            )
        self.messages[-1]["content"] += [call, {"type": "python_output", "text": text}]
        self._turn_is_open = True

    def _add_assistant(self, message: Mapping[str, Any], text: str, at: str) -> None:
        weight = {"weight": 0} if message.get("weight") == 0 else {}
        parts = [{"type": "text", "text": text, **weight}] if text else []
        if self._turn_is_open:
            self.messages[-1]["content"] += parts
        else:
            self.messages.append({"role": "assistant", "content": parts})
        for k, call in enumerate(message.get("tool_calls") or ()):
            where = f"{at}.tool_calls[{k}]"
            if call["id"] in self._pending:
                raise ValueError(f"{where}.id={call['id']!r:.80} is not allowed: it comes twice")
            text = _call_text(call["function"], f"{where}.function")
            self._pending[call["id"]] = {"type": "python", "text": text, **weight}

    def end(self, *, may_call: bool) -> None:
        """ValueError for a call without a result, unless the last message may call."""
        if self._pending and not may_call:
            call_id = next(iter(self._pending))
            raise ValueError(f"messages: the result of the call {call_id!r:.80} is missing")
        if self._pending:
            self.messages[-1]["content"] += self._pending.values()


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
        field = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        text = part.get(field) if field else None
        if not isinstance(text, str):
            raise ValueError(
                f"{at}[{i}]: type {kind!r:.40} is not supported, only 'text' with its text"
            )
        texts.append(text)
    return "\n".join(texts)


def _call_text(function: Mapping[str, Any], at: str) -> str:
    name, arguments = function["name"], function["arguments"]
    try:
        values = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{at}.arguments={arguments!r:.80} is not allowed: a JSON object")
    return call_text(name, values)


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the model writes it: the calculator's expression, or JSON."""
    if name == CALCULATOR and isinstance(expression := arguments.get(EXPRESSION), str):
        return expression
    return (
        f"{call_prefix(name)}{json.dumps(arguments, ensure_ascii=False, separators=(',', ':'))}}}"
    )


def call_prefix(name: str) -> str:
    """The start of a call of ``name``; its arguments and ``}`` follow."""
    return f'{{"name":{json.dumps(name, ensure_ascii=False)},"arguments":'


def is_calculator(function: Mapping[str, Any]) -> bool:
    """Whether a client's function is the calculator that the model is trained to call."""
    if function.get("name") != CALCULATOR:
        return False
    schema = function.get("parameters")
    if not schema:
        return True
    properties, required_names = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(properties.get(EXPRESSION), dict):
        return False
    is_text = properties[EXPRESSION].get("type", "string") == "string"
    return is_text and (required_names is None or required_names in ([], [EXPRESSION]))


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system text that declares functions other than the calculator; "" without any."""
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
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}]={message!r:.60}: a dict with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{i}].role={role!r}: one of {list(ROLES)}")
        has_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not isinstance(content, str) and not (role == "assistant" and has_parts):
            rule = "a text is expected" if role != "assistant" else "a text or parts are expected"
            raise ValueError(f"messages[{i}].content: {rule}, not {content!r:.60}")
        role = "assistant" if role == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = _join(turns[-1]["content"], content)
        else:
            turns.append({"role": role, "content": content})
    return turns


def _join(first: Any, second: Any) -> Any:
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}{_BLANK}{second}"
    result, parts = list(_parts(first)), _parts(second)
    for part in ({**parts[0], "type": "text", "text": _BLANK}, *parts):
        last = result[-1]
        # Neighbouring texts are tokenized as one, unless only one of them has a loss.
        if last.get("type") == part.get("type") == "text" and _weight(last) == _weight(part):
            result[-1] = {**last, "text": last["text"] + part["text"]}
        else:
            result.append(part)
    return result


def _weight(part: Mapping[str, Any]) -> int:
    return part.get("weight", 1)


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
        part_ids, has_loss = tok.encode(text), 1
        if kind in delimiters:
            start, end, has_loss = delimiters[kind]
            part_ids = [tok.special(start), *part_ids, tok.special(end)]
        ids += part_ids
        mask += [has_loss if _weight(part) else 0] * len(part_ids)
    return ids, mask


def render_conversation(tok: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids, and a loss mask of equal length with 1 at the tokens that the assistant writes.

    Raises ValueError for an unknown role or part.
    """
    ids, mask = [tok.bos], [0]
    for turn in _turns(messages):
        if turn["role"] == "user":
            turn_ids = tok.encode(turn["content"])
            ids += [tok.special("<|user_start|>"), *turn_ids, tok.special("<|user_end|>")]
            mask += [0] * (len(turn_ids) + 2)
        else:
            turn_ids, loss = _assistant(tok, turn["content"])
            ids += [tok.special("<|assistant_start|>"), *turn_ids, tok.special("<|assistant_end|>")]
            parts = _parts(turn["content"])
            mask += [0, *loss, 1 if not parts or _weight(parts[-1]) else 0]
    return ids, mask


def render_prompt(
    tok: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """Ids of a prompt, with the two switches that transformers and vLLM have.

    By default the prompt ends where a new assistant turn begins, or inside the assistant turn whose
    last part is a tool's result. ``continue_final_message`` leaves the last message open, which
    must be the assistant's, so that the answer continues it.
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
