"""A hung step is told from a long one."""

from __future__ import annotations

import pytest

from nanochat_ray.engine import step_clock
from nanochat_ray.engine.step_clock import StepClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [0.0]
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: time[0])
    return time


def test_a_hung_step_exceeds_the_limit(now: list[float]) -> None:
    clock = StepClock()
    clock.begin()
    now[0] = 1.0
    clock.end(num_tokens=8)
    now[0] = 100.0
    assert not clock.is_hung(10, num_tokens=8)  # idle
    clock.begin()
    now[0] = 109.9
    assert not clock.is_hung(10, num_tokens=8)
    now[0] = 110.1
    assert clock.is_hung(10, num_tokens=8)
    clock.end(num_tokens=8)
    assert not clock.is_hung(10, num_tokens=8)


def test_the_largest_step_so_far_may_compile(now: list[float]) -> None:
    clock = StepClock()
    clock.begin()
    now[0] = 99.0
    assert not clock.is_hung(10, num_tokens=1)
    now[0] = 101.0
    assert clock.is_hung(10, num_tokens=1)


def test_steps_of_a_slow_model_may_take_long(now: list[float]) -> None:
    clock = StepClock()
    clock.begin()
    now[0] = 20.0
    clock.end(num_tokens=8)
    clock.begin()
    now[0] = 20.0 + 4 * 20.0 - 1
    assert not clock.is_hung(10, num_tokens=8)
    now[0] += 2
    assert clock.is_hung(10, num_tokens=8)


def test_a_failed_step_is_over_and_says_nothing(now: list[float]) -> None:
    clock = StepClock()
    clock.begin()
    now[0] = 50.0
    clock.cancel()
    now[0] = 500.0
    assert not clock.is_hung(10, num_tokens=0)
    clock.begin()
    now[0] += 11.0
    assert clock.is_hung(10, num_tokens=0)  # not 4 times the 50 s
