"""Two ranks that share rollouts and training end with the bits of one."""

from __future__ import annotations

import dataclasses

import pytest

from nanochat_ray.storage import Store
from tests.processes import run_on_ranks
from tests.rl.tiny_rl import RL, run_rl, save_parent, weights_digest

STALE = dataclasses.replace(RL, stale=1)


def _train(rank: int, root_uri: str) -> None:
    run_rl(Store.at(root_uri), "two")
    run_rl(Store.at(root_uri), "two-stale", rl=STALE)
    # All distinct answers of a step are one micro-batch, so that the second rank has none.
    run_rl(Store.at(root_uri), "two-large", micro_batch_size=96)


@pytest.mark.slow
def test_two_ranks_end_with_the_bits_of_one(root: Store) -> None:
    save_parent(root)
    run_rl(root, "one")
    run_rl(root, "one-stale", rl=STALE)
    run_rl(root, "one-large", micro_batch_size=96)
    run_on_ranks(_train, root.uri, world=2)
    assert weights_digest(root, "two") == weights_digest(root, "one")
    assert weights_digest(root, "two-stale") == weights_digest(root, "one-stale")
    assert weights_digest(root, "two-large") == weights_digest(root, "one-large")
