"""Preparation on several nodes, from and to S3: the files that one machine writes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from nanochat_ray.storage import Store
from tests.on_ray.cluster.nodes import Nodes
from tests.processes import run_job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
WORDS = ["the", "sea", "was", "calm", "and", "Ishmael", "slept", "till", "morning", "came"]


def checksums(root: Store, dataset: str) -> dict[str, object]:
    """Of every shard, and the fingerprint of the tokenizer."""
    manifest = json.loads(root.child("datasets", dataset).read_bytes("manifest.json"))
    return {name: manifest[name] for name in ("splits", "tokenizer")}


def test_nodes_and_one_machine_give_equal_files(nodes: Nodes, storage: str) -> None:
    root = Store.at(storage).child("prepare")
    text, rng = root.child("text"), np.random.default_rng(0)
    for name in "abcdef":
        lines = [" ".join(rng.choice(WORDS, 20)) + f" {name}{i}.\n" for i in range(200)]
        text.write_text(f"{name}.txt", "".join(lines))
    flags = ["--storage", root.uri, "--text", text.uri, "--vocab-size", "300"]
    flags += ["--sequence-len", "32"]
    result = run_job("prepare", "--no-ray", "--dataset", "one", *flags)
    assert result.returncode == 0, result.stderr
    command = [sys.executable, "-m", "nanochat_ray", "prepare", "--dataset", "three", *flags]
    nodes.run(nodes.nodes[1], command, {"RAY_ADDRESS": nodes.gcs_address})
    assert checksums(root, "one") == checksums(root, "three")
