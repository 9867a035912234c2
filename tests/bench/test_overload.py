"""What an overload reports, over a scripted engine and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter

import psutil
import pytest

from nanochat_ray.bench import hostile_clients, load, overload
from nanochat_ray.bench.http_stream import Result
from nanochat_ray.bench.overload import Args, Endpoint, Memory
from nanochat_ray.bench.overload_report import AttackReport, Flood
from nanochat_ray.engine.request import EngineFull
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.generation import Limits
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import serving

TOK = Tokenizer.bytes_only()


def client() -> ScriptedClient:
    return ScriptedClient(TOK.encode("abcdef" * 20))


def test_a_flood_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "WARM_UP_S", 0.05)
    floods: list[float] = []

    def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
        floods.append(seconds)
        return _arrivals(rate, seconds, seed)

    _arrivals = overload._arrivals
    monkeypatch.setattr(overload, "_arrivals", arrivals)
    engine = client()
    args = Args(capacity=20.0, factor=10.0, seconds=0.2, output=4, prompt=4, max_recovery_s=60.0)
    with serving(build_app(engine, TOK, "tiny", 256)) as url:
        endpoint = Endpoint(Args(url=url), "tiny")
        endpoint.args = Args(**{**vars(args), "url": url})
        memory = Memory([psutil.Process(os.getpid())])
        report = asyncio.run(overload.flood(endpoint, memory))
    assert report.num_offered == report.num_admitted > 10  # 40 arrivals are expected
    assert report.num_refused == report.without_retry_after == report.failures.total() == 0
    assert report.recovery_s is not None
    assert floods == [0.05, 0.2]  # the first one is not counted
    assert report.rss_before_mib > 1
    assert report.rss_idle_mib > 1
    assert 0 < report.first_token_p50_s <= report.first_token_p99_s


def test_refusals_are_counted_with_their_header() -> None:
    results = [
        Result(0.0, first_s=1.0, total_s=2.0, tokens=4),
        Result(0.0, error="full", status=429, retry_after_s=3, total_s=0.5),
        Result(0.0, error="none", status=503, total_s=0.7),
        Result(0.0, error="status 500"),
        Result(0.0, error="refused"),
    ]
    report = Flood()
    overload._count(report, results)
    assert (report.num_offered, report.num_admitted, report.num_refused) == (5, 1, 2)
    assert report.without_retry_after == 1
    assert report.failures == Counter({"status 500": 1, "refused": 1})
    assert report.refusal_p50_s == pytest.approx(0.6)
    assert report.tokens_per_s == 2.0


@pytest.mark.parametrize(("wait_s", "retry_after_s"), [(6.2, 7), (1e9, 60)])
def test_a_refusal_says_when_to_retry(wait_s: float, retry_after_s: int) -> None:
    engine = client()
    engine.refuse = EngineFull("full", wait_s)
    with serving(build_app(engine, TOK, "tiny", 256)) as url:
        result = asyncio.run(load.complete(url, "tiny", load.Prompt([1, 2], 2)))
    assert (result.status, result.retry_after_s) == (429, retry_after_s)


def test_what_breaks_is_a_failure() -> None:
    flood = Flood(recovery_s=1.0, first_token_p99_s=2.0, rss_after_mib=50.0)
    attack = AttackReport("idle", Counter(open=3), 5, 2, 0, 0.1, 0.1, 4.0, 0.0, 0.0, 0.0)
    args = Args(max_ttft_s=3.0)
    assert overload.failures(args, flood, [attack]) == []
    flood.recovery_s, flood.first_token_p99_s, flood.rss_after_mib = None, 3.5, 70.0
    flood.failures, flood.without_retry_after = Counter({"status 500": 2}), 4
    attack.failed_answers, attack.recovery_s, attack.rss_after_mib = 1, 6.0, 65.0
    assert overload.failures(args, flood, [attack]) == [
        "2 requests: status 500",
        "4 refusals had no Retry-After",
        "first token p99: 3.50 s",
        "recovery: never s",
        "flood: memory grew by 70 MiB",
        "idle: 1 requests beside it failed, 5 were answered",
        "idle: recovery: 6.000 s",
        "idle: memory grew by 65 MiB",
    ]
    lines = (overload.flood_table(flood) + "\n" + overload.attack_table([attack])).splitlines()
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert "| never |" in lines[2]
    assert "| 3 open | 5 | 2 | 1 |" in lines[5]
    # Refusals alone are no failure, silence is.
    quiet = AttackReport("idle", Counter(), 0, 2, 0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    assert overload.failures(args, None, [quiet]) == []
    quiet.refused_answers = 0
    assert overload.failures(args, None, [quiet]) == [
        "idle: 0 requests beside it failed, 0 were answered"
    ]


def test_each_attack_ends_as_the_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile_clients, "BYTE_INTERVAL_S", 0.01)
    monkeypatch.setattr(hostile_clients, "BODY_BYTES", 4 << 20)
    monkeypatch.setattr(hostile_clients, "BOMB_BYTES", 4 << 20)
    monkeypatch.setattr(hostile_clients, "_bombs", [])
    monkeypatch.setattr(hostile_clients, "MAX_ABORT_S", 0.05)
    ends = {
        "slow-body": {"status 408"},
        "large-body": {"status 413", "closed"},  # the refusal may be lost behind a reset
        "gzip-bomb": {"status 415"},
        "abort": {"aborted"},
    }
    for name, endings in ends.items():
        # A busy machine may take long to send a large body: that one is not to be late.
        limits = Limits(body_timeout_s=0.1) if name == "slow-body" else Limits()
        with serving(build_app(client(), TOK, "tiny", 256, limits=limits)) as url:
            target = hostile_clients.Target(url=url, model="tiny", connections=2, seconds=0.3)
            outcomes = asyncio.run(hostile_clients.attack(target, name))
        assert outcomes.total() >= 2
        assert set(outcomes) <= {*endings, "open"}, name  # at the end of the time


def test_memory_is_that_of_the_server_at_the_port() -> None:
    with serving(build_app(client(), TOK, "tiny", 256)) as url:
        memory = Memory.of(url)
    assert [p.pid for p in memory.processes] == [os.getpid()]
    assert memory.mib() == pytest.approx(memory.peak_mib)
    with pytest.raises(ValueError, match="url="):
        Memory.of("http://127.0.0.1:1")


def test_unknown_attacks_are_refused() -> None:
    with pytest.raises(ValueError, match="attacks='flood' is not allowed: of idle"):
        Args(attacks=("flood",))


def test_figures_are_one_json_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fake(args: Args) -> tuple[Flood | None, list[AttackReport]]:
        flood = Flood(num_offered=3, recovery_s=1.0, failures=Counter({"status 500": 2}))
        return flood, [
            AttackReport("idle", Counter(closed=3), 5, 0, 0, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0)
        ]

    monkeypatch.setattr(overload, "overload", fake)
    assert overload.main(Args()) == 1
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["flood"]["num_offered"] == 3
    assert figures["flood"]["failures"] == {"status 500": 2}
    assert figures["attacks"][0]["outcomes"] == {"closed": 3}
    assert figures["failures"] == ["2 requests: status 500"]
