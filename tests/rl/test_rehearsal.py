"""Rehearsed conversations: which they are, their weights, and what changes no bit of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.data.packing import Conversation, unpack_conversations
from nanochat_ray.data.shards import SequenceReader
from nanochat_ray.rl.batch import make_batch
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.losses import TOKEN_INPUTS, PolicyLoss
from nanochat_ray.rl.parent import REHEARSAL, describe
from nanochat_ray.rl.rehearsal import Rehearsal
from nanochat_ray.storage import Store
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.step import MicroBatch
from tests.rl.test_advantages import random_model
from tests.rl.test_batch import CONFIG, GROUPS
from tests.rl.tiny_rl import RL, job, run_rl, save_parent, weights_digest
from tests.tiny import TOKENIZER, write_dataset

BOS = TOKENIZER.bos


def as_lists(conversations: list[Conversation]) -> list[tuple[list[int], list[int]]]:
    return [(c.ids.tolist(), c.indices.tolist()) for c in conversations]


def test_conversations_of_a_packed_sequence() -> None:
    # Two conversations, one without a trained token, and padding; then one that is cut.
    ids = np.array([[BOS, 1, 2, 3, BOS, 4, 5, BOS, 6, BOS], [BOS, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    mask = np.array([[0, 0, 1, 0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 1, 1, 1]])
    assert as_lists(unpack_conversations(ids, mask, BOS, 8)) == [
        ([BOS, 1, 2], [2]),
        ([BOS, 4, 5], [1, 2]),
        ([BOS, 1, 2, 3, 4, 5, 6, 7], [1, 3, 7]),
    ]


def test_steps_walk_through_the_dataset(root: Store) -> None:
    store, manifest = root.child("datasets", "talk"), write_dataset(root, "talk", "sft", rows=6)

    def rehearsal() -> Rehearsal:
        reader = SequenceReader(store, manifest, "train")
        return Rehearsal(reader=reader, weight=1.0, seed=3, bos=BOS, max_len=33)

    walk = rehearsal()
    steps = [as_lists(walk.conversations(step)) for step in range(6)]
    assert as_lists(rehearsal().conversations(4)) == steps[4]  # whatever came before
    epochs = [[c for step in steps[i : i + 3] for c in step] for i in (0, 3)]
    assert len(epochs[0]) == 6
    assert {ids[0] for ids, _ in epochs[0]} == {BOS}
    assert walk.reader is not None
    ids, mask = walk.reader.read(np.arange(6))
    assert mask is not None
    assert epochs[0] == as_lists(unpack_conversations(ids, mask, BOS, 33))
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_weights_of_a_batch_by_hand() -> None:
    """Three trained tokens share the weight 2 of the answers' mean over 6 sequences (grpo)."""
    conversations = [
        Conversation(np.array([20, 21]), np.array([1])),
        Conversation(np.array([22, 23, 24, 25, 26, 27]), np.array([3, 5])),
    ]
    b = make_batch(GROUPS, CONFIG, conversations, 2.0, micro_batch_size=4, rank=0, world=1)
    plain = make_batch(GROUPS, CONFIG, micro_batch_size=4, rank=0, world=1)
    assert b.ids.tolist()[0] == [20, 21, 0, 0, 0, 0]
    assert b.ids.tolist()[-1] == [22, 23, 24, 25, 26, 27]
    assert b.token_inputs["rehearsal"][0].tolist() == [0, 4, 0, 0, 0, 0]
    assert b.token_inputs["rehearsal"][-1].tolist() == [0, 0, 0, 4, 0, 4]
    assert not b.token_inputs["rehearsal"][1:-1].any()
    for name in ("weights", "advantages", "logprobs"):
        assert np.array_equal(b.token_inputs[name][1:-1, :5], plain.token_inputs[name])
        assert not b.token_inputs[name][[0, -1]].any()
    assert (b.denominator, b.metrics) == (plain.denominator, plain.metrics)


def test_without_signal_nothing_is_rehearsed() -> None:
    talk = [Conversation(np.array([20, 21]), np.array([1]))]
    b = make_batch(GROUPS[1:2], CONFIG, talk, 1.0, micro_batch_size=4, rank=0, world=1)
    assert len(b.ids) == 0


def test_its_loss_is_the_likelihood() -> None:
    model = random_model(0)
    inputs, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[-1, 3, 7]])
    logprobs = model(inputs).log_softmax(-1)[0, [1, 2], [3, 7]]
    # The first token is an answer's, the second one's rehearsed.
    values = torch.tensor([[3.0, 0], [2.0, 0], [-5.0, 0], [0.0, 4]])
    token_inputs = dict(zip(TOKEN_INPUTS, values, strict=True))
    config = RLConfig(kl=0.5)
    objective = PolicyLoss(config, Ranks(), max_diff=0, reference=model)
    loss = objective.loss(model, MicroBatch(inputs, targets, torch.tensor([1, 2]), token_inputs))
    assert loss.item() == pytest.approx((-6 * logprobs[0] - 4 * logprobs[1]).item(), rel=1e-5)
    figures = objective.finish()
    assert figures["logprob_diff"] == pytest.approx(abs(logprobs[0].item() + 5), rel=1e-5)
    assert figures["rehearsal_loss"] == pytest.approx(-logprobs[1].item(), rel=1e-5)


# --- runs -----------------------------------------------------------------------------------------


def stage_config(root: Store, rehearsal: float | None = None, run: str = "run") -> dict[str, Any]:
    config = job(root, run, rl=dataclasses.replace(RL, rehearsal=rehearsal))
    about: dict[str, Any] = config.about["stage_config"]
    return {name: about[name] for name in ("rehearsal", "rehearsal_dataset", "rehearsal_digest")}


def test_the_parents_dataset_is_rehearsed(root: Store) -> None:
    save_parent(root)
    digest = write_dataset(root, "talk", "sft").digest
    golden = {"rehearsal": REHEARSAL, "rehearsal_dataset": "talk", "rehearsal_digest": digest}
    assert stage_config(root) == golden
    assert stage_config(root, 0.25) == {**golden, "rehearsal": 0.25}
    assert stage_config(root, 0) == dict.fromkeys(golden)
    rehearsal = Rehearsal.open(job(root, "run"), TOKENIZER)
    # A conversation of a whole packed sequence is the model's 48 positions and one more target.
    assert (rehearsal.weight, rehearsal.bos, rehearsal.max_len) == (REHEARSAL, BOS, 49)


def test_without_the_dataset_there_is_none(root: Store) -> None:
    save_parent(root)
    root.delete("datasets/talk")
    assert set(stage_config(root).values()) == {None}
    with pytest.raises(ValueError, match=r"rehearsal=0\.5 is not allowed: .* \('talk'\)"):
        stage_config(root, 0.5)


@pytest.mark.slow
def test_a_run_rehearses_and_resumes(root: Store) -> None:
    save_parent(root)
    records = run_rl(root, "whole")
    losses = [r["rehearsal_loss"] for r in records if r["kind"] == "train"]
    assert all(2 < loss < 12 for loss in losses)  # ln 256 = 5.5 of a random policy
    run_rl(root, "none", rl=dataclasses.replace(RL, rehearsal=0))
    assert weights_digest(root, "none") != weights_digest(root, "whole")
    run_rl(root, "stopped", stop_after=2)
    run_rl(root, "stopped")
    assert weights_digest(root, "stopped") == weights_digest(root, "whole")
    write_dataset(root, "talk", "sft", seed=1)
    with pytest.raises(ValueError, match=r"rehearsal_digest=.* is not what this run was started"):
        job(root, "whole")


def test_a_run_from_an_rl_run_rehearses_too(root: Store) -> None:
    save_parent(root)
    run_rl(root, "first", steps=1)
    trainer = checkpoint.load_trainer(root.child("runs", "first"))
    assert trainer["about"]["stage_config"]["rehearsal_dataset"] == "talk"
    config = dataclasses.replace(job(root, "second"), parent="first", about={})
    assert describe(config, RL)["stage_config"]["rehearsal_dataset"] == "talk"
