"""The function that Ray Data's tasks run, sent to a process as Ray sends it."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from ray import cloudpickle

from nanochat_ray.on_ray.rank_reader import rank_reader
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig
from tests.tiny import write_dataset

CALL = """
import pickle, sys
import numpy as np
read = pickle.load(sys.stdin.buffer)
block = read({"first": np.array([1])})
assert not {"torch", "ray.data", "ray.train"} & set(sys.modules)
sys.stdout.buffer.write(pickle.dumps({name: column.tolist() for name, column in block.items()}))
"""


@pytest.mark.slow
def test_tasks_read_their_steps_without_torch(root: Store) -> None:
    manifest = write_dataset(root, "base", rows=20, length=8)
    config = TrainConfig(steps=3, global_batch_size=4, micro_batch_size=1)
    dataset = root.child("datasets", "base")
    read = rank_reader(dataset.uri, manifest, config, stride=5, rank=1, world=2)
    result = subprocess.run(
        [sys.executable, "-c", CALL], input=cloudpickle.dumps(read), capture_output=True, check=True
    )
    block = pickle.loads(result.stdout)
    assert block["step"] == [1, 1, 2, 2]  # the last steps of three: two sequences a rank
    assert np.array(block["ids"]).shape == (4, 9)
    whole = rank_reader(dataset.uri, manifest, config, stride=5, rank=0, world=1)
    ids = whole({"first": np.array([1])})["ids"]
    assert block["ids"] == ids[[2, 3, 6, 7]].tolist()
