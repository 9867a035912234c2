"""A user's own conversations: files in OpenAI's fine-tuning format, ShareGPT's or nanochat's.

A record is one conversation:

- ``{"messages": [{"role": …, "content": …}, …], "tools": […]}`` as OpenAI's fine-tuning takes it.
  ``"weight": 0`` at an assistant's message, or a list ``weights`` with a number for each message,
  leaves that message out of the loss.
- ``{"conversations": [{"from": "human" | "gpt" | …, "value": …}, …]}``, ShareGPT.
- ``[{"role": …, "content": …}, …]``, nanochat.
- ``{"instruction": …, "input": …, "output": …}``, Alpaca, with Dolly's names ``context`` and
  ``response`` too; or ``{"prompt": …, "completion": …}``, texts or lists of messages (TRL).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_ray.checks import require, short_repr
from nanochat_ray.data import records
from nanochat_ray.data.decoding import replace_surrogates
from nanochat_ray.text import chat
from nanochat_ray.text.chat import Message

FIELD = "chats"
VAL_SHARE = 0.05
MAX_VAL = 200
"""Most conversations of one entry in the validation split."""
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_PAIRS = (
    ("instruction", ("input", "context"), ("output", "response")),
    ("prompt", (), ("completion", "response")),
)
"""Fields of a question, of what it is about, and of its answer."""
_ENTRY = re.compile(r"(?P<uri>.+):(?P<amount>\d+(?:\.\d+)?)(?P<passes>x?)", re.DOTALL)
_ALLOWED = "write PATH, PATH:2000 for 2000 conversations, or PATH:2.5x for 2.5 passes over them"


@dataclass(frozen=True)
class Entry:
    """One value of ``--chats``."""

    uri: str
    count: int | None = None
    """Conversations to train on, sampled or repeated; None is each once."""
    passes: float | None = None
    """Instead of a count: passes over all conversations."""


def parse_entry(text: str) -> Entry:
    """``PATH``, ``PATH:count`` or ``PATH:2.5x``. Raises ValueError."""
    require(bool(text), FIELD, text, _ALLOWED)
    match = _ENTRY.fullmatch(text)
    # The port of an endpoint at the end of a URI is no count.
    if match is None or re.search(r"endpoint_override=[^:&]*$", match["uri"]):
        return Entry(text)
    amount = float(match["amount"])
    whole = match["passes"] or amount == int(amount)
    require(bool(whole) and 0 < amount <= 1e9, FIELD, text, _ALLOWED)
    if match["passes"]:
        return Entry(match["uri"], passes=amount)
    return Entry(match["uri"], count=int(amount))


@dataclass(frozen=True)
class Conversations:
    """The conversations of one entry; no conversation is in both lists."""

    name: str
    train: list[list[Message]]
    val: list[list[Message]]

    def split(self, name: str) -> list[list[Message]]:
        return self.train if name == "train" else self.val


def load(entries: Sequence[Entry], seed: int) -> list[Conversations]:
    """Reads and checks every conversation; a function of the files' contents and the seed.

    The validation split gets about 5% of the different conversations of each entry, at least one;
    equal conversations go to the same split. ValueError names the file, line and message.
    """
    uris = [entry.uri for entry in entries]
    for uri in uris:
        require(uris.count(uri) == 1, FIELD, uri, "each file or folder once")
    by_entry: list[list[tuple[int, list[Message]]]] = []
    for entry in entries:
        rows = []
        for source in records.find_files(entry.uri, FIELD):
            for where, record in records.read(source, FIELD):
                messages = _conversation(record, where)
                rows.append((_content_hash(messages), messages))
        if len({key for key, _ in rows}) < 2:
            raise ValueError(
                f"{FIELD}={entry.uri!r} has too few conversations: 2 different ones or more, one "
                "of which validates"
            )
        by_entry.append(rows)
    val_hashes: set[int] = set()
    for rows in by_entry:
        keys = sorted({key for key, _ in rows})
        val_hashes |= set(keys[: max(1, min(MAX_VAL, int(len(keys) * VAL_SHARE)))])
    result = []
    for entry, rows in zip(entries, by_entry, strict=True):
        train = [messages for key, messages in rows if key not in val_hashes]
        val = {key: messages for key, messages in rows if key in val_hashes}
        if not train:
            raise ValueError(
                f"{FIELD}={entry.uri!r}: all of it is in the validation split of another entry"
            )
        name = f"{FIELD}:{entry.uri}"
        result.append(Conversations(name, _sample(train, entry, seed), list(val.values())))
    return result


def digest(entries: Sequence[Conversations]) -> str:
    """SHA-256 (hex) of all conversations of both splits, in their order."""
    sha = hashlib.sha256()
    for conversations in entries:
        for split in (conversations.train, conversations.val):
            sha.update(b"%d\n" % len(split))
            for messages in split:
                sha.update(_canonical(messages))
    return sha.hexdigest()


def _sample(train: list[list[Message]], entry: Entry, seed: int) -> list[list[Message]]:
    """Full passes over ``train``, and a random sample for the rest of the count."""
    count = entry.count or len(train)
    if entry.passes is not None:
        count = max(1, round(entry.passes * len(train)))
    passes, rest = divmod(count, len(train))
    indices = sorted(random.Random(seed).sample(range(len(train)), rest))
    return [*(train * passes), *(train[i] for i in indices)]


def _canonical(messages: list[Message]) -> bytes:
    return json.dumps(messages, sort_keys=True).encode()


def _content_hash(messages: list[Message]) -> int:
    return int.from_bytes(hashlib.sha256(_canonical(messages)).digest()[:8], "big")


# --- one record ---------------------------------------------------------------------------------


def _conversation(record: Any, where: str) -> list[Message]:
    try:
        messages, paths, tools = _openai_form(record)
        text = json.dumps(_render(messages, paths, tools), ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return json.loads(replace_surrogates(text))


def _openai_form(record: Any) -> tuple[list[dict[str, Any]], list[str], list[dict[str, Any]]]:
    """(messages, where each is in the record, tools) in OpenAI's form, with an id at each call."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise ValueError(f"{short_repr(record)} is no conversation: an object with 'messages'")
    record = {key: value for key, value in record.items() if value is not None}
    names = ("messages", "conversations", "conversation")
    if not any(name in record for name in names):
        record = _from_pair(record)
    name = next((name for name in names if name in record), None)
    if name is None:
        raise ValueError(
            "a conversation has 'messages' (OpenAI), 'conversations' (ShareGPT), 'instruction' "
            "and 'output' (Alpaca) or 'prompt' and 'completion', not only "
            f"{short_repr(sorted(record))}"
        )
    items = record[name]
    require(isinstance(items, list) and bool(items), name, items, "a list of messages")
    messages, paths = [], [f"{name}[{i}]" for i in range(len(items))]
    for at, item in zip(paths, items, strict=True):
        require(isinstance(item, dict), at, item, "an object")
        # Parquet gives every message the fields of all.
        item = {key: value for key, value in item.items() if value is not None}
        messages.append(_from_sharegpt(item, at) if "from" in item else dict(item))
    if isinstance(system := record.get("system"), str) and system:
        messages.insert(0, {"role": "system", "content": system})
        paths.insert(0, "system")
    _spread_weights(record, messages, paths, len(items))
    _name_calls(messages, paths)
    return messages, paths, _tools(record)


def _from_pair(record: dict[str, Any]) -> dict[str, Any]:
    """A record of one question and its answer with ``messages`` instead; others as they are."""
    for question, contexts, answers in _PAIRS:
        answer = next((name for name in answers if name in record), None)
        if question not in record or answer is None:
            continue
        messages = [record[question], record[answer]]
        if all(isinstance(part, list) for part in messages):
            return {**record, "messages": [*messages[0], *messages[1]]}
        about = [name for name in contexts if record.get(name)]
        for name in (question, *about, answer):
            require(isinstance(record[name], str), name, record[name], "a text")
        text = "\n\n".join(record[name] for name in (question, *about))
        user = {"role": "user", "content": text}
        return {**record, "messages": [user, {"role": "assistant", "content": record[answer]}]}
    return record


def _from_sharegpt(item: dict[str, Any], at: str) -> dict[str, Any]:
    role = _SHAREGPT_ROLES.get(item["from"]) if isinstance(item["from"], str) else None
    choices = f"one of {', '.join(_SHAREGPT_ROLES)}"
    require(role is not None, f"{at}.from", item["from"], choices)
    value = item.get("value")
    require(isinstance(value, str), f"{at}.value", value, "a text")
    weight = {"weight": item["weight"]} if "weight" in item else {}
    if role != "call":
        return {"role": role, "content": value, **weight}
    try:
        call = json.loads(value)  # type: ignore[arg-type]
    except (ValueError, RecursionError):
        call = None
    calls = call if isinstance(call, list) else [call]
    return {"role": "assistant", "tool_calls": [{"function": c} for c in calls], **weight}


def _spread_weights(
    record: dict[str, Any], messages: list[dict[str, Any]], paths: Sequence[str], count: int
) -> None:
    """``count``: messages that the record has without its system prompt."""
    weights = record.get("weights")
    if weights is not None:
        fits = isinstance(weights, list) and len(weights) == count
        require(fits, "weights", weights, f"a list of {count} numbers, one for each message")
        for message, weight in zip(messages[-count:], weights, strict=True):
            message.setdefault("weight", weight)
    for path, message in zip(paths, messages, strict=True):
        if message.get("weight") is None:
            message.pop("weight", None)
            continue
        at, weight = f"{path}.weight", message["weight"]
        number = type(weight) in (int, float) and weight in (0, 1)
        require(number, at, weight, "0 (no loss) or 1")
        trains = message.get("role") == "assistant" or weight == 0 or weights is not None
        require(trains, at, weight, "only at an assistant's message")


def _name_calls(messages: list[dict[str, Any]], paths: Sequence[str]) -> None:
    """Checks calls; gives an id to those without one and to their results, in their order."""
    waiting: list[str] = []
    for i, (at, message) in enumerate(zip(paths, messages, strict=True)):
        if message.get("role") == "function":
            message["role"] = "tool"
        if message.get("role") == "tool" and not message.get("tool_call_id") and waiting:
            message["tool_call_id"] = waiting[0]
        if (call_id := message.get("tool_call_id")) in waiting:
            waiting.remove(call_id)
        calls = message.get("tool_calls") or []
        require(isinstance(calls, list), f"{at}.tool_calls", calls, "a list")
        if "function_call" in message:
            calls = [*calls, {"function": message.pop("function_call")}]
        message["tool_calls"] = [
            _call(call, f"{at}.tool_calls[{k}]", f"call_{i}_{k}") for k, call in enumerate(calls)
        ]
        waiting += [call["id"] for call in message["tool_calls"]]


def _call(call: Any, at: str, call_id: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    fits = isinstance(function, dict) and isinstance(function.get("name"), str)
    require(fits, at, call, "an object with a function that has a name and arguments")
    arguments = function.get("arguments", "{}")  # type: ignore[union-attr]
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    require(isinstance(arguments, str), f"{at}.function.arguments", arguments, "a JSON object")
    number = call.get("id") or call_id
    require(isinstance(number, str), f"{at}.id", number, "a text")
    return {"id": number, "function": {"name": function["name"], "arguments": arguments}}  # type: ignore[index]


def _tools(record: dict[str, Any]) -> list[dict[str, Any]]:
    tools = record.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError(
                f"tools={short_repr(tools)} is not allowed: a list of functions"
            ) from None
    require(isinstance(tools, list), "tools", tools, "a list of functions")
    if functions := record.get("functions"):
        require(isinstance(functions, list), "functions", functions, "a list of functions")
        tools = [*tools, *({"function": function} for function in functions)]
    result = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        fits = isinstance(function, dict) and isinstance(function.get("name"), str)
        require(fits, f"tools[{i}]", tool, "an object with a function that has a name")
        parameters = function.get("parameters")  # type: ignore[union-attr]
        is_schema = parameters is None or isinstance(parameters, dict)
        require(is_schema, f"tools[{i}].function.parameters", parameters, "a JSON Schema")
        result.append({"type": "function", "function": function})
    return result


def _render(
    messages: list[dict[str, Any]], paths: Sequence[str], tools: list[dict[str, Any]]
) -> list[Message]:
    """The conversation in the form of ``text.chat``; parts of messages of weight 0 are marked."""
    result = chat.from_openai(messages, tools, paths=paths, open_calls=True)
    if not any(_has_loss(message) for message in result):
        raise ValueError("no message of the assistant's has a loss: there is nothing to learn")
    return result


def _has_loss(message: Message) -> bool:
    content = message["content"]
    if message["role"] != "assistant" or not content:
        return False
    return isinstance(content, str) or any(part.get("weight", 1) for part in content)
