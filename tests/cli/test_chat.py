"""``nanochat-ray chat`` over a real server: a full context loses its oldest turns, visibly."""

from __future__ import annotations

import builtins
import socketserver
import threading
from collections.abc import Iterator

import pytest

from nanochat_ray.cli import chat
from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import serving

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
