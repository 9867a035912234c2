"""The parts of RL's steps: a tiny run, and figures by hand."""

from __future__ import annotations

import pytest

from nanochat_ray.bench import rl_step
from nanochat_ray.bench.rl_step import Args, Parts
from nanochat_ray.cli import rl
from nanochat_ray.storage import Store
from tests.rl.tiny_rl import TASK, save_parent


@pytest.mark.slow
def test_each_step_has_its_parts(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save_parent(root)
    flags = {"questions": 3, "samples": 4, "max_tokens": 4, "truncation": "grade", "pool": 9}
    make_args = rl.Args

    def tiny(**values: object) -> rl.Args:
        return make_args(**values, tasks=(TASK,), rl=flags)  # type: ignore[arg-type]

    monkeypatch.setattr(rl, "Args", tiny)
    parts = rl_step.measure(Args(storage=root.uri, steps=3))
    assert len(parts) == 3
    assert all(seconds > 0 for part in parts for seconds in part)
    assert not root.child("runs").exists("bench-rl-step")


def test_shares_by_hand() -> None:
    result = rl_step.figures([Parts(1.0, 0.5, 0.4, 0.2), Parts(2.0, 0.5, 0.6, 0.4)])
    assert result["rehearsal_share"] == pytest.approx(0.2 / 2.0)
    assert (result["rollouts_s"], result["gradient_without_s"]) == (1.5, pytest.approx(0.3))
