"""What Ray's metrics get, without a Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.util import metrics as ray_metrics

from nanochat_ray.on_ray.serve.metrics import RaySink
from nanochat_ray.serve.metrics import EngineMetrics, RequestMetrics


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str], float]]:
    samples: list[tuple[str, dict[str, str], float]] = []

    def record(metric: Any, value: float, tags: dict[str, str] | None = None) -> None:
        labels = metric._get_final_tags(tags)
        metric._validate_tags(labels)
        assert labels.keys() == set(metric.info["tag_keys"])
        samples.append((metric.info["name"], labels, value))

    monkeypatch.setattr(ray_metrics.Metric, "_record", record)
    return samples


def test_engines_of_a_node_are_told_apart(
    samples: list[tuple[str, dict[str, str], float]],
) -> None:
    """Ray drops the label of the process: two gauges with equal labels would count as one."""
    stats = {"running": 2, "kernels": "amx", "weight_version": "step-000001"}
    for engine in ("a", "b"):
        EngineMetrics(RaySink("m", engine)).update(engine, stats)
    gauges = [(name, labels) for name, labels, _ in samples]
    assert all(gauges.count(gauge) == 1 for gauge in gauges)
    for name, label, value in (
        ("nanochat_num_engines", "kernels", "amx"),
        ("nanochat_num_engines_by_checkpoint", "checkpoint", "step-000001"),
    ):
        labels = [labels for each, labels, _ in samples if each == name]
        assert labels == [{"model_name": "m", "engine": e, label: value} for e in ("a", "b")]
    running = [(labels, value) for name, labels, value in samples if name.endswith("running")]
    assert running == [({"model_name": "m", "engine": e}, 2) for e in ("a", "b")]


def test_requests_have_no_engine(samples: list[tuple[str, dict[str, str], float]]) -> None:
    requests = RequestMetrics(RaySink("m"))
    assert samples == []  # Ray refuses to add 0 to a counter
    requests.refusals(1, "429")
    requests.generation(3, "")
    assert samples == [
        ("nanochat_request_refusals", {"model_name": "m", "status": "429"}, 1),
        ("nanochat_generation_tokens", {"model_name": "m"}, 3),
    ]
