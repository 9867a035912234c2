"""The dashboard asks for figures that the server gives, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

from nanochat_ray.serve.metrics import EngineMetrics, PrometheusSink, RequestMetrics

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "serving.json"


def page() -> tuple[PrometheusSink, RequestMetrics, EngineMetrics]:
    sink = PrometheusSink("tiny")
    return sink, RequestMetrics(sink), EngineMetrics(sink)


def test_dashboard_names_are_served() -> None:
    sink, requests, engines = page()
    engines.put("0", {})
    timer = requests.timer()
    timer.taken(1)
    timer.tokens(1)
    timer.end("stop")
    served = set(re.findall(r"^(\w+)[{ ]", sink.text().decode(), re.MULTILINE))
    board = json.loads(DASHBOARD.read_text())
    asked = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"\$\{prefix\}(\w+)", target["expr"]))
    assert asked
    assert {f"nanochat{name}" for name in asked} <= served


def test_a_replaced_engine_goes_on_counting() -> None:
    sink, _, engines = page()
    for count in (5, 9, 2):
        engines.put("0", {"preemptions": count})
    name = 'nanochat_num_preemptions_total{engine="0",model_name="tiny"}'
    assert f"{name} 11.0" in sink.text().decode()


def test_an_engine_that_is_gone_is_forgotten_until_it_comes_back() -> None:
    sink, _, engines = page()
    both = {"a": {"running": 32, "steps": 7}, "b": {"running": 1}}
    engines.put_all(both)
    engines.put_all({"b": {"running": 2}})
    text = sink.text().decode()
    assert 'engine="a"' not in text
    assert 'nanochat_num_requests_running{engine="b",model_name="tiny"} 2.0' in text
    engines.put_all({**both, "a": {"steps": 9}})
    assert 'nanochat_engine_steps_total{engine="a",model_name="tiny"} 9.0' in sink.text().decode()


def test_engines_are_counted_by_their_kernels() -> None:
    sink, _, engines = page()

    def shown(kernels: str) -> str:
        (line,) = re.findall(rf'nanochat_num_engines{{kernels="{kernels}".*', sink.text().decode())
        return str(line).rpartition(" ")[2]

    engines.put_all({"a": {"kernels": "amx"}, "b": {"kernels": "amx"}, "c": {"kernels": "torch"}})
    assert (shown("amx"), shown("torch")) == ("2.0", "1.0")
    engines.put_all({"a": {"kernels": "amx"}, "c": {"kernels": "amx"}})
    assert (shown("amx"), shown("torch")) == ("2.0", "0.0")
    engines.put("d", {})  # it has not started yet
    assert shown("amx") == "2.0"
