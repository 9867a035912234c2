"""The number of replicas: the policy alone, without Ray (with it: test_serve.py)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanochat_ray.on_ray.serve.autoscaling import Load, policy, target_num_replicas


def load(running: float, waiting: float = 0, kv_cache_usage: float = 0.0) -> Load:
    return Load(running=running, waiting=waiting, slots=10, kv_cache_usage=kv_cache_usage)


@pytest.mark.parametrize(
    ("loads", "num_replicas", "target"),
    [
        ([], 1, 1),  # no replica has reported yet
        ([load(0)], 1, 1),
        ([load(9)], 1, 1),  # full
        ([load(10)], 1, 2),
        ([load(10, waiting=30)], 1, 5),
        ([load(10, waiting=30)], 3, 5),  # two of them are starting
        ([load(10, waiting=30), load(0), load(0)], 5, 5),
        ([load(3, kv_cache_usage=0.9)], 1, 2),  # few, but long
        ([load(9), load(9)], 2, 2),
        ([load(3), load(3)], 2, 2),  # one would suffice, but be nearly full
        ([load(3), load(2)], 2, 1),
        ([load(0, kv_cache_usage=0.0), load(1, kv_cache_usage=0.6)], 2, 2),
        ([load(0)] * 4, 4, 1),
    ],
)
def test_replicas_follow_queues_and_caches(
    loads: list[Load], num_replicas: int, target: int
) -> None:
    assert target_num_replicas(loads, num_replicas) == target


def test_policy_reads_what_serve_gives() -> None:
    metrics = {"running_requests": {"a": 0.0, "b": 0.0}}
    context = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=2)
    assert policy(context) == (1, {})  # a replica without metrics is idle
    metrics |= {
        "running": {"a": 10},
        "waiting": {"a": 12},
        "slots": {"a": 10},
        "kv_cache_usage": {"a": 0.1},
    }
    assert policy(context) == (3, {})
    context.target_num_replicas = 4  # two of them are starting
    assert policy(context) == (4, {})


def test_a_steady_load_does_not_oscillate() -> None:
    for requests in range(300):
        for before in range(1, 30):
            after = target_num_replicas([load((requests + 0.5) / before)] * before, before)
            assert target_num_replicas([load((requests + 0.5) / after)] * after, after) == after
