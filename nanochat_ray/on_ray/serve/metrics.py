"""Exports metrics through Ray; the Prometheus endpoint of each node has them as ``ray_<name>``."""

from __future__ import annotations

from collections.abc import Sequence

from ray.util import metrics

from nanochat_ray.serve.metrics import Record


class RaySink:
    """A ``serve.metrics.Sink``. Ray adds the labels of node and worker."""

    def __init__(self, model: str):
        self._tags = {"model_name": model}

    def _keys(self, label: str) -> tuple[str, ...]:
        return ("model_name", label) if label else ("model_name",)

    def counter(self, name: str, about: str, label: str = "") -> Record:
        metric = metrics.Counter(name, about, self._keys(label)).set_default_tags(self._tags)

        def record(value: float, key: str) -> None:
            if value > 0:  # Ray refuses 0
                metric.inc(value, {label: key} if label else None)

        return record

    def gauge(self, name: str, about: str, label: str = "") -> Record:
        metric = metrics.Gauge(name, about, self._keys(label)).set_default_tags(self._tags)
        return lambda value, key: metric.set(value, {label: key} if label else None)

    def histogram(self, name: str, about: str, buckets: Sequence[float]) -> Record:
        metric = metrics.Histogram(name, about, list(buckets), self._keys(""))
        metric.set_default_tags(self._tags)
        return lambda value, key: metric.observe(value)

    def forget(self, key: str) -> None:
        """Does nothing: Ray drops the gauges of a process when it ends, and keeps its counters."""
