"""What a server tells of itself, under the names that users of vLLM know, with ``nanochat_``.

Two things are measured where they happen: requests, in the process that speaks HTTP
(``RequestMetrics``), and engines, from their ``Stats`` (``EngineMetrics``). Where the figures go is
a ``Sink``: here Prometheus' own client, on Ray Ray's metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "nanochat_"

Record = Callable[[float, str], None]
"""Takes a value and the value of the metric's one label ("" if it has none)."""

FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
BETWEEN_TOKENS_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.75, 1, 2.5, 10)
END_TO_END_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 960)


class Sink(Protocol):
    """Where figures go. ``label`` names the one label that a metric has, "" for none."""

    def counter(self, name: str, about: str, label: str = "") -> Record: ...
    def gauge(self, name: str, about: str, label: str = "") -> Record: ...
    def histogram(self, name: str, about: str, buckets: Sequence[float]) -> Record: ...

    def forget(self, key: str) -> None:
        """Drops all that was said of a label's value."""
        ...


class PrometheusSink:
    """Prometheus' client with a registry of its own; ``text`` is what ``/metrics`` answers."""

    def __init__(self, model: str):
        self._registry = CollectorRegistry()
        self._model = model
        self._labelled: list[tuple[Any, dict[str, Any]]] = []
        """Metrics with a label, and their children by its values."""

    def counter(self, name: str, about: str, label: str = "") -> Record:
        metric = Counter(name, about, self._labels(label), registry=self._registry)
        children = self._children(metric, label)
        return lambda value, key: children(key).inc(value)

    def gauge(self, name: str, about: str, label: str = "") -> Record:
        metric = Gauge(name, about, self._labels(label), registry=self._registry)
        children = self._children(metric, label)
        return lambda value, key: children(key).set(value)

    def histogram(self, name: str, about: str, buckets: Sequence[float]) -> Record:
        metric = Histogram(
            name, about, self._labels(""), registry=self._registry, buckets=tuple(buckets)
        )
        observe = metric.labels(self._model).observe
        return lambda value, key: observe(value)

    def forget(self, key: str) -> None:
        for metric, found in self._labelled:
            if found.pop(key, None) is not None:
                metric.remove(self._model, key)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    @staticmethod
    def _labels(label: str) -> list[str]:
        return ["model_name", label] if label else ["model_name"]

    def _children(self, metric: Any, label: str) -> Callable[[str], Any]:
        """The metric's child for a label's value. ``labels`` takes a lock and is slower."""
        found: dict[str, Any] = {}
        if label:
            self._labelled.append((metric, found))
        else:
            found[""] = metric.labels(self._model)  # so that it is there from the start, as 0

        def child(key: str) -> Any:
            if key not in found:
                found[key] = metric.labels(self._model, key)
            return found[key]

        return child


class Tee:
    """Two sinks as one."""

    def __init__(self, one: Sink, other: Sink):
        self._one, self._other = one, other

    @staticmethod
    def _both(one: Record, other: Record) -> Record:
        def record(value: float, key: str) -> None:
            one(value, key)
            other(value, key)

        return record

    def counter(self, name: str, about: str, label: str = "") -> Record:
        args = (name, about, label)
        return self._both(self._one.counter(*args), self._other.counter(*args))

    def gauge(self, name: str, about: str, label: str = "") -> Record:
        args = (name, about, label)
        return self._both(self._one.gauge(*args), self._other.gauge(*args))

    def histogram(self, name: str, about: str, buckets: Sequence[float]) -> Record:
        args = (name, about, buckets)
        return self._both(self._one.histogram(*args), self._other.histogram(*args))

    def forget(self, key: str) -> None:
        self._one.forget(key)
        self._other.forget(key)


class RequestMetrics:
    """Latencies and counts of requests, as their reader sees them."""

    def __init__(self, sink: Sink):
        self.first_token = sink.histogram(
            f"{PREFIX}time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            FIRST_TOKEN_S,
        )
        self.between_tokens = sink.histogram(
            f"{PREFIX}inter_token_latency_seconds",
            "Between a request's tokens; a step that gave several counts once.",
            BETWEEN_TOKENS_S,
        )
        self.end_to_end = sink.histogram(
            f"{PREFIX}e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
            END_TO_END_S,
        )
        self.prompt = sink.counter(f"{PREFIX}prompt_tokens", "Tokens of prompts that were taken.")
        self.generation = sink.counter(f"{PREFIX}generation_tokens", "Tokens of answers.")
        self.success = sink.counter(
            f"{PREFIX}request_success",
            "Requests that ended, by how: stop, length, abort or error.",
            "finished_reason",
        )

    def timer(self) -> Timer:
        return Timer(self)


COUNTED_TOGETHER = 32
"""Tokens of an answer that are added to the counter at once: on Ray that takes 3 µs."""


class Timer:
    """One request's clock, from its creation on. Who is refused is not counted: ``taken`` and
    ``end`` are never called."""

    def __init__(self, metrics: RequestMetrics):
        self._metrics = metrics
        self._began = time.monotonic()
        self._last = 0.0
        self._uncounted = 0
        self._ended = False

    def taken(self, prompt_tokens: int) -> None:
        self._metrics.prompt(prompt_tokens, "")

    def tokens(self, count: int) -> None:
        """So many have come now."""
        now = time.monotonic()
        if self._last:
            self._metrics.between_tokens(now - self._last, "")
        else:
            self._metrics.first_token(now - self._began, "")
        self._last = now
        self._uncounted += count
        if self._uncounted >= COUNTED_TOGETHER:
            self._count()

    def _count(self) -> None:
        self._metrics.generation(self._uncounted, "")
        self._uncounted = 0

    def end(self, reason: str) -> None:
        """The first call counts."""
        if self._ended:
            return
        self._ended = True
        self._count()
        if reason in ("stop", "length"):
            self._metrics.end_to_end(time.monotonic() - self._began, "")
        self._metrics.success(1, reason)


_GAUGES = {
    "num_requests_running": ("running", "Requests that have a slot."),
    "num_requests_waiting": ("waiting", "Requests that wait for a slot."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Share of the cache that is in use; 1 is all of it."),
}
_COUNTERS = {
    "prefix_cache_queries": ("num_lookup_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("num_hit_tokens", "Prompt tokens found there."),
    "num_preemptions": ("preemptions", "Requests that had to give their slot back."),
    "engine_steps": ("steps", "Forward passes of the engine."),
    "engine_step_seconds": ("step_seconds", "Seconds spent in them."),
}


class EngineMetrics:
    """Figures of engines, from their ``Stats`` as plain values, by a name for each engine."""

    def __init__(self, sink: Sink):
        self._sink = sink
        self._gauges = {
            field: sink.gauge(PREFIX + name, about, "engine")
            for name, (field, about) in _GAUGES.items()
        }
        self._counters = {
            field: sink.counter(PREFIX + name, about, "engine")
            for name, (field, about) in _COUNTERS.items()
        }
        self._seen: dict[tuple[str, str], float] = {}
        self._by_kernels = sink.gauge(
            f"{PREFIX}num_engines",
            "Engines by the kernels that they compute with: instructions of the CPU, or torch.",
            "kernels",
        )
        self._kernels: dict[str, str] = {}
        """Of each engine."""

    def put_all(self, engines: Mapping[str, Mapping[str, Any]]) -> None:
        """Those of all engines that there are: one that is gone is forgotten, and counts again from
        0 to where it is if it comes back."""
        for gone in {engine for engine, _ in self._seen} - engines.keys():
            self._sink.forget(gone)
            self._put_kernels(gone, None)
            for field in self._counters:
                del self._seen[gone, field]
        for engine, stats in engines.items():
            self.put(engine, stats)

    def put(self, engine: str, stats: Mapping[str, Any]) -> None:
        self._put_kernels(engine, stats.get("kernels"))
        for field, record in self._gauges.items():
            record(stats.get(field, 0), engine)
        for field, record in self._counters.items():
            now = stats.get(field, 0)
            before = self._seen.get((engine, field), 0)
            # An engine that was replaced in place counts from zero again.
            record(now - before if now >= before else now, engine)
            self._seen[engine, field] = now

    def _put_kernels(self, engine: str, kernels: str | None) -> None:
        """Shows what an engine computes with; None: it is gone, or has not started yet."""
        before = self._kernels.pop(engine, None)
        if kernels is not None:
            self._kernels[engine] = kernels
        if before != kernels:
            for each in {before, kernels} - {None}:
                self._by_kernels(sum(k == each for k in self._kernels.values()), str(each))
