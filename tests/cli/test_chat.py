"""``nanochat-ray chat`` over a real server: a full context loses its oldest turns, visibly. What it
sends and prints, over recorded responses."""

from __future__ import annotations

import builtins
import contextlib
import copy
import io
import json
import os
import socketserver
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from typing import Any

import pytest

from nanochat_ray.cli import chat
from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import serving
from tests.waiting import wait_for

TOK = Tokenizer.bytes_only()


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient(TOK.encode("Hello there."))


@pytest.fixture
def url(engine: ScriptedClient) -> Iterator[str]:
    with serving(build_app(engine, TOK, "tiny", 200)) as url:
        yield url


def test_full_context_drops_oldest_turns(
    url: str,
    engine: ScriptedClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = iter([*(f"question {i} is a little longer" for i in range(8)), "/quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(lines))
    chat.main(chat.Args(url=url, system="Be brief."))
    output = capsys.readouterr().out
    assert output.count("Hello there.") == 8
    assert "the oldest 2 messages are left out" in output
    text = TOK.decode(engine.requests[-1].prompt)
    assert "Be brief." in text
    assert "question 7" in text
    assert "question 0" not in text


def test_question_that_alone_is_too_long_is_an_error(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["x" * 300, "short", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(lines))
    chat.main(chat.Args(url=url))
    output = capsys.readouterr().out
    assert "error: This model's maximum context length is 200 tokens" in output
    assert "Hello there." in output


def test_a_terminal_edits_long_lines(engine: ScriptedClient) -> None:
    """Without readline it cuts a line at 4,095 bytes and takes an arrow key for text."""
    pytest.importorskip("readline")
    terminal, inside = os.openpty()
    output: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the end, on Linux
            while data := os.read(terminal, 65536):
                output.append(data)

    def type_in(keys: bytes) -> None:
        while keys:
            keys = keys[os.write(terminal, keys) :]

    reader = threading.Thread(target=read, daemon=True)
    environment = {**os.environ, "TERM": "dumb", "INPUTRC": os.devnull}
    with serving(build_app(engine, TOK, "tiny", 8000)) as url:
        command = [sys.executable, "-m", "nanochat_ray", "chat", "--url", url]
        with subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, env=environment
        ) as process:
            try:
                os.close(inside)
                reader.start()
                wait_for(lambda: b"\n> " in b"".join(output), what="the prompt")
                type_in(b"x" * 5000 + b"bd\x1b[Dc\n")
                wait_for(lambda: bool(engine.requests), what="the request")
                type_in(b"/quit\n")
                assert process.wait(60) == 0
            finally:
                process.kill()
    reader.join(60)
    os.close(terminal)
    assert "x" * 5000 + "bcd<" in TOK.decode(engine.requests[0].prompt)


class BrokenAnswer(socketserver.StreamRequestHandler):
    """Ends the connection in the middle of a chunk of the answer."""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        event = b'data: {"choices": [{"delta": {"content": "Hel"}}]}\n\n'
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.write(b"40\r\ndata: {")


def test_an_answer_that_breaks_off_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), BrokenAnswer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        args = chat.Args(url=f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(ValueError, match="the answer broke off"):
            chat.answer(args, "m", [{"role": "user", "content": "hi"}])
        server.shutdown()
    assert capsys.readouterr().out == "Hel"


HELLO: list[Any] = [{"choices": [{"delta": {"content": "Hello"}}]}]
USER = {"role": "user", "content": "hi"}


def stream(events: list[Any], end: str = "data: [DONE]\n\n") -> io.BytesIO:
    return io.BytesIO(("".join(f"data: {json.dumps(e)}\n\n" for e in events) + end).encode())


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Those that a server gets which always says hello, in a context that is never full."""
    result: list[dict[str, Any]] = []

    def call(args: chat.Args, path: str, body: Any = None) -> io.BytesIO:
        if path == "/v1/models":
            return io.BytesIO(b'{"data": [{"id": "first"}, {"id": "second"}]}')
        if path == "/tokenize":
            return io.BytesIO(b'{"count": 1, "max_model_len": 1000}')
        assert path == "/v1/chat/completions"
        result.append(copy.deepcopy(body))
        return stream(HELLO)

    monkeypatch.setattr(chat, "call", call)
    return result


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    rest = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)


def test_flags_are_fields_of_the_request(bodies: list[dict[str, Any]]) -> None:
    chat.main(chat.Args(once="hi"))
    fields = {"temperature": 0.0, "top_k": 0, "max_tokens": 1, "seed": 0}
    chat.main(chat.Args(once="hi", model="other", system="Be brief.", **fields))  # type: ignore[arg-type]
    assert bodies == [
        {
            "model": "first",
            "messages": [USER],
            "stream": True,
            "temperature": 0.6,
            "top_k": 50,
        },
        {
            "model": "other",
            "stream": True,
            **fields,
            "messages": [{"role": "system", "content": "Be brief."}, USER],
        },
    ]


def test_a_chat_sends_what_was_said(
    bodies: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_lines(monkeypatch, " hi ", "", "and?", "/new", "hi", EOFError)
    chat.main(chat.Args(system="Be."))
    system, answer = (
        {"role": role, "content": text}
        for role, text in (("system", "Be."), ("assistant", "Hello"))
    )
    assert [body["messages"] for body in bodies] == [
        [system, USER],
        [system, USER, answer, {"role": "user", "content": "and?"}],
        [system, USER],
    ]
    assert capsys.readouterr().out.count("left out") == 0
    for end in (KeyboardInterrupt, "/quit"):
        type_lines(monkeypatch, end)
        chat.main(chat.Args())
    assert len(bodies) == 3


def test_deltas_are_printed_as_they_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"calculator": [{"expression": "1+1", "result": "2"}]}
    deltas = [{"role": "assistant"}, {"content": "a"}, call, {"content": None}, {"content": "b"}]
    events = [{"choices": [{"delta": delta}]} for delta in deltas]
    events.insert(2, {"choices": [], "usage": {}})
    end = ": a comment\n\ndata: [DONE]\n\ndata: nothing any more\n\n"
    monkeypatch.setattr(chat, "call", lambda *_: stream(events, end))
    assert chat.answer(chat.Args(), "m", [USER]) == "ab"
    assert capsys.readouterr().out == "a[1+1 = 2] b\n"


def test_ctrl_c_keeps_what_was_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def deltas(*_: Any) -> Iterator[dict[str, Any]]:
        yield {"content": "Hel"}
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "deltas", deltas)
    assert chat.answer(chat.Args(), "m", [USER]) == "Hel"
    assert capsys.readouterr().out == "Hel [stopped]\n"


def test_an_error_event_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    error = {"error": {"message": "the engine is gone"}}
    monkeypatch.setattr(chat, "call", lambda *_: stream([*HELLO, error]))
    with pytest.raises(ValueError, match="the engine is gone"):
        chat.answer(chat.Args(), "m", [USER])


@pytest.mark.parametrize(
    ("size", "max_tokens", "context", "rest"),
    [
        (10, 0, 79, [0, 1, 2, 3, 4, 5]),  # of which 19 are for the answer
        (10, 0, 78, [0, 3, 4, 5]),
        (10, 5, 65, [0, 1, 2, 3, 4, 5]),
        (10, 5, 64, [0, 3, 4, 5]),
        (290, 0, 2000, [0, 1, 2, 3, 4, 5]),  # no more than 256 are for the answer
        (10, 0, 10, [0, 5]),  # the system message and the last question stay
    ],
)
def test_room_is_made_for_an_answer(
    monkeypatch: pytest.MonkeyPatch, size: int, max_tokens: int, context: int, rest: list[int]
) -> None:
    """Each message has ``size`` tokens."""
    monkeypatch.setattr(chat, "count", lambda _, messages: (size * len(messages), context))
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert chat.make_room(chat.Args(max_tokens=max_tokens), messages) == 6 - len(rest)
    assert [int(m["content"]) for m in messages] == rest


def test_a_server_that_cannot_count_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [USER, USER]
    for body in (b"{}", b"[]", b"no JSON", b'{"count": null, "max_model_len": 1}'):
        monkeypatch.setattr(chat, "call", lambda *_, body=body: io.BytesIO(body))
        assert chat.make_room(chat.Args(), messages) == 0
    assert len(messages) == 2


def test_requests_have_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[urllib.request.Request] = []

    def urlopen(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        requests.append(request)
        return io.BytesIO()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    args = chat.Args(url="http://a:1/")
    chat.call(args, "/v1/models")
    monkeypatch.setenv("NANOCHAT_API_KEY", "k")
    chat.call(args, "/tokenize", {"a": "é"})
    for url in ("http://a:1/v1", "http://a:1/v1/"):
        chat.call(chat.Args(url=url), "/v1/models")
    first, second, *others = requests
    assert [other.full_url for other in others] == [first.full_url] * 2
    assert (first.full_url, first.get_method(), first.data) == ("http://a:1/v1/models", "GET", None)
    assert (second.get_method(), json.loads(second.data or b"")) == ("POST", {"a": "é"})  # type: ignore[arg-type]
    assert [r.get_header("Authorization") for r in (first, second)] == [None, "Bearer k"]
    assert second.get_header("Content-type") == "application/json"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no such model"}}', "^no such model$"),
        (b'{"error": "x"}', "^HTTP Error 404: Not Found$"),
        (b'{"detail": "x"}', "^HTTP Error 404: Not Found$"),
        (b"<html>", "^HTTP Error 404: Not Found$"),
        (None, "^url=http://a:1 cannot be reached: .*refused"),
    ],
)
def test_what_the_server_says_is_the_error(
    monkeypatch: pytest.MonkeyPatch, body: bytes | None, message: str
) -> None:
    def urlopen(*_: Any, **__: Any) -> None:
        if body is None:
            raise ConnectionRefusedError("refused")
        raise urllib.error.HTTPError("http://a:1", 404, "Not Found", Message(), io.BytesIO(body))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match=message):
        chat.call(chat.Args(url="http://a:1"), "/v1/models")
