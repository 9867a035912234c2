"""The estimate of memory against runs that were measured, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from nanochat_ray import scaling
from nanochat_ray.config import ModelConfig, TrainConfig, from_json, to_json
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.train import memory
from nanochat_ray.train.job import DTYPES
from nanochat_ray.train.step import Batch, train_step

WIDE = scaling.model_config(4, 8192, sequence_len=512)


def train_config(**fields: Any) -> TrainConfig:
    values = {"steps": 10, "batch_rows": 16, "micro_rows": 16, "precision": "bf16", **fields}
    return TrainConfig(**values)


def measure(model_values: dict[str, Any], train_values: dict[str, Any]) -> int:
    """Peak resident bytes of this process after three steps and the copies of a checkpoint."""
    torch.set_num_threads(1)
    config = from_json(ModelConfig, model_values)
    train = from_json(TrainConfig, train_values)
    model = GPT(config, DTYPES[train.precision])
    model.init_weights(torch.Generator().manual_seed(0))
    model.checkpoint_activations = train.checkpoint_activations
    optimizer = ShardedOptimizer(model, train.optim, model.compute_dtype)
    shape = (train.batch_rows, config.sequence_len + 1)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    copies = []
    for step in range(2):
        train_step(model, optimizer, Batch(ids.numpy()), step, train)
        if not step:
            copies += [
                optimizer.state_dict(),
                {k: v.clone() for k, v in model.state_dict().items()},
            ]
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM"))
    return int(peak.split()[1]) << 10


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        (WIDE, {}),
        (WIDE, {"checkpoint_activations": True}),
        (WIDE, {"precision": "fp32", "micro_rows": 8}),
        (scaling.model_config(6, 4096, sequence_len=256), {"micro_rows": 8}),
    ],
    ids=["bf16", "checkpointed", "fp32", "deeper"],
)
def test_the_estimate_is_near_what_a_process_takes(
    shape: ModelConfig, changes: dict[str, Any]
) -> None:
    train = train_config(**changes)
    code = (
        "import sys, json; sys.path.insert(0, 'tests/train'); import test_memory; "
        "print(test_memory.measure(*json.loads(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([to_json(shape), to_json(train)])],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    measured = int(done.stdout)
    wanted = memory.estimate(shape, train, world=1, on_gpu=False)
    print(f"measured {measured / 2**30:.2f} GiB, estimated {wanted.total / 2**30:.2f}", wanted)
    assert wanted.total == pytest.approx(measured, rel=0.25)
