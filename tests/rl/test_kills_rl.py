"""SIGKILL at any moment of an RL run, then the same command: the same weights, bitwise.

``NANOCHAT_KILLS=20 pytest tests/rl/test_kills_rl.py -s --timeout 0`` kills as often as it says.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess

import pytest
import torch

from nanochat_ray.storage import Store
from tests.processes import FORKSERVER
from tests.rl.tiny_rl import RL, run_rl, save_parent, weights_digest
from tests.waiting import wait_for

KILLS = int(os.environ.get("NANOCHAT_KILLS", "2"))
STEPS = 6
DEADLINE_S = 300


def train(root_uri: str, run: str, stale: int) -> None:
    torch.set_num_threads(1)
    rl = dataclasses.replace(RL, stale=stale)
    run_rl(Store.at(root_uri), run, rl=rl, steps=STEPS, save_every=1, eval_every=3)


@pytest.mark.slow
@pytest.mark.parametrize("stale", [0, 1])
def test_killed_at_any_moment_ends_equal(root: Store, stale: int) -> None:
    save_parent(root)

    def start(run: str) -> ForkServerProcess:
        process = FORKSERVER.Process(target=train, args=(root.uri, run, stale))
        process.start()
        return process

    def complete(process: ForkServerProcess) -> None:
        process.join(DEADLINE_S)
        assert process.exitcode == 0

    for name in ("first", "whole"):  # the first also starts the server of processes
        begin = time.monotonic()
        complete(start(name))
        seconds = time.monotonic() - begin
    reference = weights_digest(root, "whole")
    rng, kills = random.Random(time.time_ns()), 0
    while kills < KILLS:
        run = f"killed-{kills}-{time.time_ns()}"
        process = start(run)
        end = time.monotonic() + rng.uniform(0.1, 0.9) * seconds
        wait_for(
            lambda at=end: time.monotonic() > at, DEADLINE_S, "the moment to kill", every=0.001
        )
        process.kill()
        process.join(DEADLINE_S)
        if process.exitcode != -signal.SIGKILL:
            continue  # it was faster than the moment
        complete(start(run))
        assert weights_digest(root, run) == reference
        kills += 1
    print(f"{kills} of {kills} killed runs ended with the bits of the uninterrupted one")
