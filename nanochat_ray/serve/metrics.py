"""Metrics of a server, under vLLM's names with the prefix ``nanochat_``.

``RequestMetrics`` measures requests in the process that serves HTTP, ``EngineMetrics`` publishes
the ``Stats`` of engines. Both write to a ``Sink``: Prometheus' own client, or Ray's metrics on Ray.
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


REASONS = ("stop", "length", "abort", "error")
"""Values of the label ``finished_reason``."""
REFUSALS = ("429", "500", "503", "504")
"""Values of the label ``status``: of requests that are right and get no answer."""


class Sink(Protocol):
    """Where metrics are written. ``label`` names the one label of a metric; "" for none."""

    def counter(self, name: str, about: str, label: str = "") -> Record: ...
    def gauge(self, name: str, about: str, label: str = "") -> Record: ...
    def histogram(self, name: str, about: str, buckets: Sequence[float]) -> Record: ...

    def forget(self, key: str) -> None:
        """Removes all metrics with this value of their label."""
        ...


class PrometheusSink:
    """Prometheus' client with its own registry; ``text`` is the body of ``/metrics``."""

    def __init__(self, model: str):
        self._registry = CollectorRegistry()
        self._model = model
        self._children_by_label: list[tuple[Any, dict[str, Any]]] = []
        """Each metric that has a label, and its children by the value of the label."""

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
        for metric, children in self._children_by_label:
            if children.pop(key, None) is not None:
                metric.remove(self._model, key)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    @staticmethod
    def _labels(label: str) -> list[str]:
        return ["model_name", label] if label else ["model_name"]

    def _children(self, metric: Any, label: str) -> Callable[[str], Any]:
        """The metric's child for a value of its label. ``labels`` takes a lock and is slower."""
        children: dict[str, Any] = {}
        if label:
            self._children_by_label.append((metric, children))
        else:
            children[""] = metric.labels(self._model)  # it exists from the start, as 0

        def child(key: str) -> Any:
            if key not in children:
                children[key] = metric.labels(self._model, key)
            return children[key]

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
    """Latencies and counts of requests, as a client sees them."""

    def __init__(self, sink: Sink):
        self.first_token = sink.histogram(
            f"{PREFIX}time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            FIRST_TOKEN_S,
        )
        self.between_tokens = sink.histogram(
            f"{PREFIX}inter_token_latency_seconds",
            "Between a request's tokens; a step with several tokens counts once.",
            BETWEEN_TOKENS_S,
        )
        self.end_to_end = sink.histogram(
            f"{PREFIX}e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
            END_TO_END_S,
        )
        self.prompt = sink.counter(f"{PREFIX}prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation = sink.counter(f"{PREFIX}generation_tokens", "Tokens of answers.")
        self.success = sink.counter(
            f"{PREFIX}request_success",
            "Finished requests by reason: stop, length, abort or error.",
            "finished_reason",
        )
        self.refusals = sink.counter(
            f"{PREFIX}request_refusals",
            "Requests that got a status in place of an answer: 429 (queue full or too slow), "
            "503 (no engine), 504 (request_timeout_s) or 500.",
            "status",
        )
        # Prometheus sees no rise where a series begins at 1.
        for reason in REASONS:
            self.success(0, reason)
        for status in REFUSALS:
            self.refusals(0, status)

    def timer(self) -> Timer:
        return Timer(self)


COUNTED_TOGETHER = 32
"""Tokens of an answer that are added to the counter at once: each addition takes 3 µs on Ray."""


class Timer:
    """Measures one request from its creation on. Refused requests are not measured: ``accept`` and
    ``end`` are not called for them."""

    def __init__(self, metrics: RequestMetrics):
        self._metrics = metrics
        self._start = time.monotonic()
        self._last = 0.0
        self._num_pending = 0
        self._has_ended = False

    def accept(self, prompt_tokens: int) -> None:
        self._metrics.prompt(prompt_tokens, "")

    def tokens(self, count: int) -> None:
        """``count`` tokens have arrived."""
        now = time.monotonic()
        if self._last:
            self._metrics.between_tokens(now - self._last, "")
        else:
            self._metrics.first_token(now - self._start, "")
        self._last = now
        self._num_pending += count
        if self._num_pending >= COUNTED_TOGETHER:
            self._count()

    def _count(self) -> None:
        self._metrics.generation(self._num_pending, "")
        self._num_pending = 0

    def end(self, reason: str) -> None:
        """Only the first call counts."""
        if self._has_ended:
            return
        self._has_ended = True
        self._count()
        if reason in ("stop", "length"):
            self._metrics.end_to_end(time.monotonic() - self._start, "")
        self._metrics.success(1, reason)


_GAUGES = {
    "num_requests_running": ("running", "Requests that run."),
    "num_requests_waiting": ("waiting", "Requests in the queue."),
    "kv_cache_usage_perc": ("kv_cache_usage", "Used share of the KV cache, from 0 to 1."),
}
_COUNTERS = {
    "prefix_cache_queries": ("num_lookup_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("num_hit_tokens", "Prompt tokens that came from the prefix cache."),
    "num_preemptions": ("preemptions", "Preempted requests."),
    "queued_requests": ("num_queued", "Requests that waited for a slot before their first token."),
    "queued_request_seconds": ("queue_seconds", "Seconds until that first token, in total."),
    "spec_decode_num_draft_tokens": ("num_draft_tokens", "Draft tokens of speculative decoding."),
    "spec_decode_num_accepted_tokens": ("num_accepted_tokens", "Draft tokens that were accepted."),
    "engine_steps": ("steps", "Forward passes of the engine."),
    "engine_step_seconds": ("step_seconds", "Seconds spent in forward passes."),
}


class _EngineCount:
    """How many engines have each value of a label."""

    def __init__(self, record: Record):
        self._record = record
        self._values: dict[str, str] = {}
        """Of each engine."""

    def update(self, engine: str, value: str) -> None:
        """``value``: "" for an engine that is missing or has not started yet."""
        before = self._values.pop(engine, "")
        if value:
            self._values[engine] = value
        if before != value:
            for each in {before, value} - {""}:
                self._record(sum(v == each for v in self._values.values()), each)


class EngineMetrics:
    """Metrics of engines, from their ``Stats`` as plain values, by the name of each engine."""

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
        self._totals: dict[tuple[str, str], float] = {}
        self._by_kernels = _EngineCount(
            sink.gauge(
                f"{PREFIX}num_engines",
                "Engines by kernels: instructions of the CPU, or torch.",
                "kernels",
            )
        )
        self._by_checkpoint = _EngineCount(
            sink.gauge(
                f"{PREFIX}num_engines_by_checkpoint",
                "Engines by the weights that they serve.",
                "checkpoint",
            )
        )

    def update_all(self, engines: Mapping[str, Mapping[str, Any]]) -> None:
        """Statistics of all engines. The metrics of an engine that is missing are removed; if it
        returns, they start again with its totals."""
        for engine in {engine for engine, _ in self._totals} - engines.keys():
            self._sink.forget(engine)
            self._by_kernels.update(engine, "")
            self._by_checkpoint.update(engine, "")
            for field in self._counters:
                del self._totals[engine, field]
        for engine, stats in engines.items():
            self.update(engine, stats)

    def update(self, engine: str, stats: Mapping[str, Any]) -> None:
        self._by_kernels.update(engine, stats.get("kernels", ""))
        self._by_checkpoint.update(engine, stats.get("weight_version", ""))
        for field, record in self._gauges.items():
            record(stats.get(field, 0), engine)
        for field, record in self._counters.items():
            now = stats.get(field, 0)
            before = self._totals.get((engine, field), 0)
            # A new engine under the same name starts from zero.
            record(now - before if now >= before else now, engine)
            self._totals[engine, field] = now


class FollowMetrics:
    """Counters of a follower, from its ``status``."""

    def __init__(self, sink: Sink):
        self._records = {
            "num_swaps": sink.counter(
                f"{PREFIX}checkpoint_swaps", "Checkpoints that were rolled out to the engines."
            ),
            "num_refusals": sink.counter(
                f"{PREFIX}checkpoints_refused", "Checkpoints that were refused; the log says why."
            ),
        }
        self._totals = dict.fromkeys(self._records, 0)

    def update(self, status: Mapping[str, Any]) -> None:
        for name, record in self._records.items():
            now = int(status.get(name, 0))
            before = self._totals[name]
            # A follower that restarts begins with zero.
            record(now - before if now >= before else now, "")
            self._totals[name] = now
