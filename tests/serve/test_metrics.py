"""The dashboard asks for figures that the server gives, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nanochat_ray.serve import metrics
from nanochat_ray.serve.metrics import (
    EngineMetrics,
    FollowMetrics,
    PrometheusSink,
    RequestMetrics,
)

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "serving.json"


def page() -> tuple[PrometheusSink, RequestMetrics, EngineMetrics]:
    sink = PrometheusSink("tiny")
    return sink, RequestMetrics(sink), EngineMetrics(sink)


def test_dashboard_names_are_served() -> None:
    sink, requests, engines = page()
    engines.update("0", {"kernels": "amx", "weight_version": "step-000001-ab"})
    FollowMetrics(sink)
    requests.refusals(1, "429")
    timer = requests.timer()
    timer.accept(1)
    timer.tokens(1)
    timer.end("stop")
    names = set(re.findall(r"^(\w+)[{ ]", sink.text().decode(), re.MULTILINE))
    board = json.loads(DASHBOARD.read_text())
    board_names = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            board_names |= set(re.findall(r"\$\{prefix\}(\w+)", target["expr"]))
    assert board_names
    assert {f"nanochat{name}" for name in board_names} <= names


def test_counters_of_requests_begin_with_zero() -> None:
    """increase() sees no rise where a series begins at 1."""
    sink, *_ = page()
    text = sink.text().decode()
    pattern = r'^nanochat_(request_\w+_total)\{.*(?:status|finished_reason)="(\w+)".*\} 0\.0$'
    counters = re.findall(pattern, text, re.MULTILINE)
    reasons = [("request_success_total", r) for r in ("stop", "length", "abort", "error")]
    statuses = [("request_refusals_total", s) for s in ("429", "500", "503", "504")]
    assert sorted(counters) == sorted(reasons + statuses)


class Clock:
    """Stands still until it is set."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def values(sink: PrometheusSink) -> dict[str, float]:
    """Every sample that is not 0, by its name; a bucket's with its bound."""
    samples = re.findall(r"^nanochat_(\w+)\{(.*?)\} (\S+)$", sink.text().decode(), re.MULTILINE)
    samples_by_name = {}
    for name, labels, value in samples:
        if float(value) and not name.endswith("_created"):
            rest = re.search(r'(?:le|finished_reason)="([^"]+)"', labels)
            samples_by_name[f"{name} {rest[1]}" if rest else name] = float(value)
    return samples_by_name


def test_latencies_by_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    sink, requests, _ = page()
    timer = requests.timer()
    clock.now = 100.75
    timer.accept(7)
    timer.tokens(1)
    for clock.now in (101.0, 101.5):
        timer.tokens(2)
    clock.now = 103.0
    timer.end("length")
    timer.end("abort")
    samples_by_name = values(sink)
    assert samples_by_name["time_to_first_token_seconds_sum"] == 0.75
    assert samples_by_name["time_to_first_token_seconds_count"] == 1
    assert samples_by_name["inter_token_latency_seconds_sum"] == 0.75
    assert samples_by_name["inter_token_latency_seconds_count"] == 2
    assert samples_by_name["e2e_request_latency_seconds_sum"] == 3.0
    assert samples_by_name["e2e_request_latency_seconds_count"] == 1
    assert (samples_by_name["prompt_tokens_total"], samples_by_name["generation_tokens_total"]) == (
        7,
        5,
    )
    assert samples_by_name["request_success_total length"] == 1
    assert "request_success_total abort" not in samples_by_name
    # Buckets hold what is at most their bound.
    assert "time_to_first_token_seconds_bucket 0.5" not in samples_by_name
    assert samples_by_name["time_to_first_token_seconds_bucket 0.75"] == 1
    assert samples_by_name["inter_token_latency_seconds_bucket 0.4"] == 1


@pytest.mark.parametrize("reason", ["stop", "length", "abort", "error"])
def test_only_complete_requests_have_a_latency(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "time", Clock())
    sink, requests, _ = page()
    timer = requests.timer()
    for _ in range(33):
        timer.tokens(1)
    # Counted 32 at a time, the rest at the end.
    assert values(sink)["generation_tokens_total"] == 32
    timer.end(reason)
    samples_by_name = values(sink)
    assert samples_by_name["generation_tokens_total"] == 33
    assert samples_by_name[f"request_success_total {reason}"] == 1
    assert ("e2e_request_latency_seconds_count" in samples_by_name) == (
        reason in ("stop", "length")
    )


def test_engine_figures_by_name() -> None:
    sink, _, engines = page()
    stats = {
        "running": 3,
        "waiting": 4,
        "kv_cache_usage": 0.5,
        "num_lookup_tokens": 50,
        "num_hit_tokens": 20,
    }
    engines.update("0", stats | {"preemptions": 6, "steps": 70, "step_seconds": 8.5})
    assert values(sink) == {
        "num_requests_running": 3,
        "num_requests_waiting": 4,
        "kv_cache_usage_perc": 0.5,
        "prefix_cache_queries_total": 50,
        "prefix_cache_hits_total": 20,
        "num_preemptions_total": 6,
        "engine_steps_total": 70,
        "engine_step_seconds_total": 8.5,
    }


@pytest.mark.parametrize(
    ("bounds", "numbers"),
    # Recorded: histograms of two versions of a server are added bucket by bucket.
    [
        (
            metrics.FIRST_TOKEN_S,
            "0.005 0.01 0.02 0.04 0.06 0.1 0.25 0.5 0.75 1 2.5 5 10 20 40 80",
        ),
        (
            metrics.BETWEEN_TOKENS_S,
            "0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.4 0.75 1 2.5 10",
        ),
        (metrics.END_TO_END_S, "0.1 0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 60 120 240 960"),
    ],
)
def test_bucket_bounds_are_constant(bounds: tuple[float, ...], numbers: str) -> None:
    assert bounds == tuple(map(float, numbers.split()))


def test_a_follower_counts_swaps_and_refusals() -> None:
    sink = PrometheusSink("tiny")
    follower = metrics.FollowMetrics(sink)
    follower.update({})
    assert values(sink) == {}
    for status in ({"num_swaps": 2}, {"num_swaps": 3, "num_refusals": 1}):
        follower.update(status)
    assert values(sink) == {"checkpoint_swaps_total": 3, "checkpoints_refused_total": 1}
    for swaps in (1, 2):  # it has restarted
        follower.update({"num_swaps": swaps, "num_refusals": 1})
    assert values(sink) == {"checkpoint_swaps_total": 5, "checkpoints_refused_total": 1}


def test_two_sinks_get_the_same() -> None:
    sinks = PrometheusSink("tiny"), PrometheusSink("tiny")
    both = metrics.Tee(*sinks)
    RequestMetrics(both).timer().end("stop")
    engines = EngineMetrics(both)
    engines.update_all({"a": {"running": 2, "steps": 5}})
    assert values(sinks[0]) == values(sinks[1])
    assert values(sinks[1])["engine_steps_total"] == 5
    engines.update_all({})
    assert "engine_steps_total" not in values(sinks[0]) | values(sinks[1])


def test_a_replaced_engine_goes_on_counting() -> None:
    sink, _, engines = page()
    for count in (5, 9, 9, 2, 6):  # 9 by the first, 6 by the second
        engines.update("0", {"preemptions": count})
    name = 'nanochat_num_preemptions_total{engine="0",model_name="tiny"}'
    assert f"{name} 15.0" in sink.text().decode()


def test_an_engine_that_is_gone_is_forgotten_until_it_comes_back() -> None:
    sink, _, engines = page()
    both = {"a": {"running": 32, "steps": 7}, "b": {"running": 1}}
    engines.update_all(both)
    engines.update_all({"b": {"running": 2}})
    text = sink.text().decode()
    assert 'engine="a"' not in text
    assert 'nanochat_num_requests_running{engine="b",model_name="tiny"} 2.0' in text
    engines.update_all({**both, "a": {"steps": 9}})
    assert 'nanochat_engine_steps_total{engine="a",model_name="tiny"} 9.0' in sink.text().decode()


def test_engines_are_counted_by_their_weights() -> None:
    sink, _, engines = page()
    engines.update_all({name: {"weight_version": f"step-{name}"} for name in "ab"})
    engines.update_all({name: {"weight_version": "step-b"} for name in "ab"})
    name = 'nanochat_num_engines_by_checkpoint{checkpoint="step-%s",model_name="tiny"}'
    assert f"{name % 'b'} 2.0" in sink.text().decode()
    engines.update_all({"b": {"weight_version": "step-b"}})
    assert f"{name % 'a'} 0.0" in sink.text().decode()
    assert f"{name % 'b'} 1.0" in sink.text().decode()


def test_engines_are_counted_by_their_kernels() -> None:
    sink, _, engines = page()

    def num_engines(kernels: str) -> str:
        (line,) = re.findall(rf'nanochat_num_engines{{kernels="{kernels}".*', sink.text().decode())
        return str(line).rpartition(" ")[2]

    engines.update_all(
        {"a": {"kernels": "amx"}, "b": {"kernels": "amx"}, "c": {"kernels": "torch"}}
    )
    assert (num_engines("amx"), num_engines("torch")) == ("2.0", "1.0")
    engines.update_all({"a": {"kernels": "amx"}, "c": {"kernels": "amx"}})
    assert (num_engines("amx"), num_engines("torch")) == ("2.0", "0.0")
    engines.update("d", {})  # it has not started yet
    assert num_engines("amx") == "2.0"
    assert values(sink) == {"num_engines": 2}  # and its counters are 0
