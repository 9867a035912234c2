"""Requests at given times, whatever becomes of those before."""

from __future__ import annotations

import socket

import pytest

from nanochat_ray.bench import load, open_loop
from nanochat_ray.bench.http_stream import Result
from nanochat_ray.bench.open_loop import OpenLoop
from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient, full
from tests.serve.serving import serving

TOK = Tokenizer.bytes_only()
DUES = [0.0, 0.0, 0.05, 0.05]


def results_of(url: str) -> list[Result]:
    prompts = load.random_prompts(len(DUES), vocab=256, prompt=2000, output=6, spread=0.5)
    requests = [load.completion_request(url, "tiny", prompt) for prompt in prompts]
    loop = OpenLoop(url, requests, DUES)
    results = [exchange.result() for exchange in loop.run()]
    assert loop.all_sent.is_set()
    assert min(loop.send_delays_s) >= 0
    assert results[2].began - results[0].began >= DUES[2] - loop.send_delays_s[0]
    assert [r.tokens for r in results if not r.error] in ([p.output for p in prompts], [])
    return results


def test_answers_and_refusals_are_those_of_the_server() -> None:
    engine = ScriptedClient(TOK.encode("abcdef" * 20), delay=0.01)
    with serving(build_app(engine, TOK, "tiny", 4096)) as url:
        for result in results_of(url):
            assert result.error == ""
            assert 0.99 * engine.delay < result.first_s < result.total_s
        engine.refuse = full()
        for result in results_of(url):
            assert (result.status, result.retry_after_s) == (429, 1)
            assert result.total_s > 0


def test_a_refused_connection_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for result in results_of(url):
        assert (result.status, "refused" in result.error) == (0, True)


def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_loop, "ANSWER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        results = results_of(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert all("no end within 0.05 s" in result.error for result in results)
