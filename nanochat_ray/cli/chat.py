"""Chat with an endpoint in the terminal.

    nanochat-ray chat --url http://127.0.0.1:8000
    nanochat-ray chat --once "What is 12 + 7?"

Ctrl-C stops an answer; /new begins a new chat, /quit (or Ctrl-D) ends. NANOCHAT_API_KEY holds the
key, if the server asks for one.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nanochat_ray.checks import check_float, check_int, require


@dataclass(frozen=True, kw_only=True)
class Args:
    url: str = "http://127.0.0.1:8000"
    """Address of the endpoint, with or without /v1."""
    once: str = ""
    """Send this message, print the answer and end."""
    model: str = ""
    """Name of the model; by default the server's first."""
    system: str = ""
    """System prompt."""
    temperature: float = 0.6
    """Sampling temperature; 0 is greedy."""
    top_k: int = 50
    """Sample from this many most likely tokens; 0 is all."""
    max_tokens: int = 0
    """Longest answer, in tokens; 0 is what fits."""
    seed: int | None = None
    """Seed of the sampling; by default another one for each answer."""

    def __post_init__(self) -> None:
        ok = self.url.startswith(("http://", "https://"))
        require(ok, "url", self.url, "http://host:port or https://…")
        check_float("temperature", self.temperature)
        check_int("top_k", self.top_k, -1)
        check_int("max_tokens", self.max_tokens, 0)


def call(args: Args, path: str, body: dict[str, Any] | None = None) -> Any:
    """The open response. ValueError says what the server, or the network, answered."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("NANOCHAT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    base = args.url.rstrip("/").removesuffix("/v1")
    request = urllib.request.Request(base + path, data, headers)
    try:
        return urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = str(error)
        raise ValueError(message) from None
    except OSError as error:
        raise ValueError(f"url={args.url} cannot be reached: {error}") from None


def count(args: Args, messages: list[dict[str, str]]) -> tuple[int, int] | None:
    """(tokens of the messages, tokens of the context); None if the server cannot tell."""
    try:
        with call(args, "/tokenize", {"messages": messages}) as response:
            figures = json.load(response)
        return int(figures["count"]), int(figures["max_model_len"])
    except (ValueError, KeyError, TypeError):
        return None


def make_room(args: Args, messages: list[dict[str, str]]) -> int:
    """Drops the oldest turns, in place, until the rest and an answer of some length fit into the
    context; system messages and the last question stay. Returns how many messages were dropped."""
    start = 0
    while start < len(messages) and messages[start]["role"] == "system":
        start += 1
    num_dropped = 0
    while (figures := count(args, messages)) is not None:
        tokens, context = figures
        users = [i for i in range(start + 1, len(messages)) if messages[i]["role"] == "user"]
        if not users or tokens + min(args.max_tokens or 256, context // 4) <= context:
            break
        num_dropped += users[0] - start
        del messages[start : users[0]]
    return num_dropped


def deltas(args: Args, model: str, messages: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "stream": True,
        "temperature": args.temperature,
        "top_k": args.top_k,
    }
    if args.max_tokens:
        body["max_tokens"] = args.max_tokens
    if args.seed is not None:
        body["seed"] = args.seed
    # A connection that breaks may be an error, or look like the end of the answer.
    broken = contextlib.suppress(OSError, http.client.HTTPException)
    with call(args, "/v1/chat/completions", body) as response, broken:
        for line in response:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ValueError(event["error"]["message"])
            if event["choices"]:
                yield event["choices"][0]["delta"]
    raise ValueError("the answer broke off: the connection was lost")


def answer(args: Args, model: str, messages: list[dict[str, str]]) -> str:
    """Prints an answer as it comes; what was printed of it is returned."""
    text = ""
    try:
        for delta in deltas(args, model, messages):
            for call in delta.get("calculator", []):
                print(f"[{call['expression']} = {call['result']}]", end=" ", flush=True)
            text += delta.get("content") or ""
            print(delta.get("content") or "", end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return text


def main(args: Args) -> None:
    with call(args, "/v1/models") as response:
        model = args.model or json.load(response)["data"][0]["id"]
    opening = [{"role": "system", "content": args.system}] if args.system else []
    if args.once:
        answer(args, model, [*opening, {"role": "user", "content": args.once}])
        return
    print(f"{model}: /new begins a new chat, /quit ends, Ctrl-C stops an answer")
    messages = list(opening)
    if sys.stdin.isatty():
        # Without it a terminal cuts lines at 4,095 bytes, and an arrow key is part of the text.
        with contextlib.suppress(ImportError):  # not every Python has it
            importlib.import_module("readline")
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/new":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            if num_dropped := make_room(args, messages):
                print(f"[the context is full: the oldest {num_dropped} messages are left out]")
            try:
                messages.append({"role": "assistant", "content": answer(args, model, messages)})
            except ValueError as error:
                messages.pop()
                print(f"error: {error}")
