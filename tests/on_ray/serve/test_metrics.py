"""What Ray's metrics get, without a Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.util import metrics as ray_metrics

from nanochat_ray.on_ray.serve.metrics import RaySink
from nanochat_ray.serve.metrics import EngineMetrics, RequestMetrics


def test_ray_gets_labels_and_no_zero_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    samples: list[tuple[str, dict[str, str], float]] = []

    def record(metric: Any, value: float, tags: dict[str, str] | None = None) -> None:
        labels = metric._get_final_tags(tags)
        assert labels.keys() == set(metric.info["tag_keys"])
        samples.append((metric.info["name"], labels, value))

    monkeypatch.setattr(ray_metrics.Metric, "_record", record)
    requests = RequestMetrics(RaySink("m"))
    assert samples == []  # Ray refuses to add 0 to a counter
    requests.refusals(1, "429")
    requests.generation(3, "")
    EngineMetrics(RaySink("m")).update("e", {"kernels": "amx", "running": 2})
    assert [sample for sample in samples if sample[2]] == [
        ("nanochat_request_refusals", {"model_name": "m", "status": "429"}, 1),
        ("nanochat_generation_tokens", {"model_name": "m"}, 3),
        ("nanochat_num_engines", {"model_name": "m", "kernels": "amx"}, 1),
        ("nanochat_num_requests_running", {"model_name": "m", "engine": "e"}, 2),
    ]
