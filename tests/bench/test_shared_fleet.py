"""The benchmark of a shared fleet counts whole rounds and takes medians of phases."""

from __future__ import annotations

import itertools
import threading

import pytest

from nanochat_ray.bench import shared_fleet
from nanochat_ray.bench.http_stream import Result
from nanochat_ray.bench.shared_fleet import FIGURES, Args, Sampling, medians, table, users


def test_rollouts_are_counted_by_whole_rounds() -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    rounds = itertools.count()

    def sample() -> int:
        if next(rounds) == 2:
            has_begun.set()
            assert may_end.wait(60)
        return 10

    with Sampling(sample) as sampling:
        assert has_begun.wait(60)
        sampling._stop.set()
        may_end.set()
    assert (sampling.num_rounds, sampling.num_tokens) == (3, 30)


def sample_in_vain() -> int:
    raise OSError("the fleet has gone")


def test_an_error_of_sampling_is_raised() -> None:
    with pytest.raises(OSError, match="the fleet has gone"), Sampling(sample_in_vain):
        pass


def test_an_error_of_the_block_comes_first() -> None:
    def fail_late() -> None:
        with Sampling(sample_in_vain) as sampling:
            assert sampling._future.exception(60)
            raise ValueError("503")

    with pytest.raises(ValueError, match="503") as error:
        fail_late()
    assert error.value.__notes__ == ["Sampling has failed too: OSError('the fleet has gone')"]


def test_nothing_is_compared_with_zero() -> None:
    alone = {**dict.fromkeys(FIGURES, 2.0), "itl_p50_ms": 0.0}
    lines = table(alone, dict.fromkeys(FIGURES, 3.0)).splitlines()
    assert [line.split()[-1] for line in lines] == ["1.50", "1.50", "-", "1.50", "1.50"]


def test_medians_of_each_figure() -> None:
    phases = [dict.fromkeys(FIGURES, x) for x in (1.0, 9.0, 2.0)]
    assert medians(phases) == dict.fromkeys(FIGURES, 2.0)


def test_a_failed_request_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    async def drive(*_: object, **__: object) -> tuple[list[Result], float]:
        return [Result(0.0), Result(0.0, error="503")], 1.0

    monkeypatch.setattr(shared_fleet.load, "drive", drive)
    with pytest.raises(ValueError, match="1 requests failed, the first: 503"):
        users(Args(), "chat", 0)
