"""Preparation by Ray Data: bit for bit the dataset that is prepared without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat_ray.data import sources, tokenizers
from nanochat_ray.data.map_tasks import map_in_processes, map_serially
from nanochat_ray.data.prepare import prepare_base, prepare_sft
from nanochat_ray.on_ray import session
from nanochat_ray.on_ray.tasks import map_tasks
from nanochat_ray.storage import Store
from nanochat_ray.tasks.conversations import Entry
from nanochat_ray.tasks.mixture import Mixture

pytestmark = pytest.mark.ray
WORDS = ["the", "sea", "was", "calm", "and", "Ishmael", "slept", "till", "morning", "came"]


@pytest.fixture(autouse=True)
def _quiet(ray_session: None) -> None:
    session.quiet_data()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for name in "abcde":
        lines = [" ".join(rng.choice(WORDS, 20)) + f" {name}{i}.\n" for i in range(400)]
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def files_of(root: Store, name: str) -> dict[str, bytes]:
    """Every file of a dataset; of the manifest, all but the speed and the checksum over it."""
    dataset = root.child("datasets", name)
    files = {file: dataset.read_bytes(file) for file in dataset.list()}
    manifest = json.loads(files["manifest.json"])
    del manifest["checksum"]
    manifest["about"].pop("tokens_per_s", None)
    return files | {"manifest.json": json.dumps(manifest, sort_keys=True).encode()}


def test_ray_and_processes_give_equal_files(
    root: Store, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 50_000)
    (tmp_path / "my.jsonl").write_text(
        "\n".join(
            json.dumps(
                [
                    {"role": "user", "content": f"Which is {i}?"},
                    {"role": "assistant", "content": f"It is {i}."},
                ]
            )
            for i in range(40)
        )
    )
    mixture = Mixture.load(
        [("chain_sum", 2100), ("identity", 60)], [Entry(str(tmp_path / "my.jsonl"))], seed=3
    )
    for name, mapping in (("ray", map_tasks), ("pool", map_in_processes), ("one", map_serially)):
        options: dict[str, Any] = {"text": [str(text)], "vocab_size": 400, "sequence_len": 64}
        base = prepare_base(root.uri, name, map_tasks=mapping, **options, seed=5)
        prepare_sft(
            root.uri,
            f"{name}-sft",
            map_tasks=mapping,
            mixture=mixture,
            tokenizer=tokenizers.load(root, base.tokenizer[:16]),
            sequence_len=128,
        )
    for name in ("pool", "one"):
        assert files_of(root, name) == files_of(root, "ray")
        assert files_of(root, f"{name}-sft") == files_of(root, "ray-sft")


def test_task_errors_pass_through_ray_unchanged() -> None:
    def work(item: str) -> dict[str, str]:
        raise ValueError(f"text file {item} is not text")

    with pytest.raises(ValueError, match=r"^text file late is not text$"):
        list(map_tasks(["late"], work))
