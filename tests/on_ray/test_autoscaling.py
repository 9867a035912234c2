"""How many engines are wanted: the policy alone, without Ray (with it: test_serve.py)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanochat_ray.on_ray.autoscaling import Load, policy, wanted


def load(running: float, waiting: float = 0, kv_used: float = 0.0) -> Load:
    return Load(running=running, waiting=waiting, slots=10, kv_used=kv_used)


@pytest.mark.parametrize(
    ("loads", "engines", "expected"),
    [
        ([], 1, 1),  # nobody has said anything yet
        ([load(0)], 1, 1),
        ([load(9)], 1, 1),  # all that it should have
        ([load(10)], 1, 2),
        ([load(10, waiting=30)], 1, 5),
        ([load(10, waiting=30)], 3, 5),  # two of them start just now
        ([load(10, waiting=30), load(0), load(0)], 5, 5),
        ([load(3, kv_used=0.9)], 1, 2),  # few, but long
        ([load(9), load(9)], 2, 2),
        ([load(3), load(3)], 2, 2),  # one could do it, but not much more
        ([load(3), load(2)], 2, 1),
        ([load(0, kv_used=0.0), load(1, kv_used=0.6)], 2, 2),
        ([load(0)] * 4, 4, 1),
    ],
)
def test_engines_are_wanted_for_queues_and_full_caches(
    loads: list[Load], engines: int, expected: int
) -> None:
    assert wanted(loads, engines) == expected


def test_the_policy_reads_what_serve_gives_it() -> None:
    told = {"running_requests": {"a": 0.0, "b": 0.0}}
    context = SimpleNamespace(aggregated_metrics=told, target_num_replicas=2)
    assert policy(context) == (1, {})  # an engine that has not said anything yet is idle
    told |= {"running": {"a": 10}, "waiting": {"a": 12}, "slots": {"a": 10}, "kv_used": {"a": 0.1}}
    assert policy(context) == (3, {})


def test_a_steady_load_never_goes_to_and_fro() -> None:
    for requests in range(300):
        for engines in range(1, 30):
            found = wanted([load((requests + 0.5) / engines)] * engines, engines)
            # Spread over that many, it wants the same.
            assert wanted([load((requests + 0.5) / found)] * found, found) == found
