"""``bench core``: figures by hand, and which weights nanochat's model can get."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_ray.bench import core as bench
from nanochat_ray.bench.nanochat_checkout import weights_of
from nanochat_ray.evals.core import Option, Question
from nanochat_ray.evals.core_data import CoreTask
from nanochat_ray.model.gpt import GPT
from tests.tiny import TOKENIZER, tiny_config

TASK = CoreTask("copa", "copa.jsonl", "multiple_choice", 0, 0.5)


def logits_of(ids: Tensor) -> Tensor:
    """``[1, T]`` → ``[1, T, 3]``: 0, ln 2 and ln 5 behind tokens 0 and 1, zeros behind token 2."""
    row = torch.tensor([1.0, 2.0, 5.0]).log()
    return torch.where((ids == 2)[..., None], 0.0, row)


def test_margin_by_hand() -> None:
    # Odds 1 : 2 : 5, so the losses of 1 and 2 behind 0 are ln(8/2) and ln(8/5).
    choice = Question([Option([0, 1], 1), Option([0, 2], 1), Option([0, 0], 1)], 0)
    assert bench.margin(logits_of, choice) == pytest.approx(torch.tensor(2.5).log().item())
    # Means: (ln(8/5) + ln 3) / 2 of two tokens, ln 3 of one: behind 2 all are alike.
    choice = Question([Option([0, 2, 1], 1), Option([2, 1], 1)], 0)
    difference = abs((torch.tensor(1.6).log() - torch.tensor(3.0).log()).item()) / 2
    assert bench.margin(logits_of, choice) == pytest.approx(difference)
    # Of a continuation, the closest two tokens: behind 0 they are ln(5/2) apart, behind 2 equal.
    assert bench.margin(logits_of, Question([Option([0, 0, 1], 1)], None)) == pytest.approx(
        torch.tensor(2.5).log().item()
    )
    assert bench.margin(logits_of, Question([Option([0, 2, 1], 1)], None)) == 0


def test_differences_are_counted_and_named() -> None:
    examples = [{"query": str(i)} for i in range(5)]
    ours, theirs = [True, False, True, True, True], [True, True, True, False, None]
    result = bench.compare(TASK, examples, lambda: ours, lambda: theirs, lambda i: i / 8)
    assert result.differences == [("copa", 1, 1 / 8), ("copa", 3, 3 / 8)]
    assert (result.questions, result.correct) == (4, 3)
    s = bench.Seconds
    figures = bench.Comparison("copa", 4, 3, s(2.0, 1.0), s(8.0, 3.0), result.differences)
    equal = bench.Comparison("piqa", 6, 1, s(1.0, 1.0), s(7.0, 3.0), [])
    assert bench.table([figures, equal]).splitlines()[2:] == [
        "| copa | 4 | 2 | 3 | 2.00 | 0.50 | 4.0 | 3.0 |",
        "| piqa | 6 | 6 | 1 | 6.00 | 0.86 | 7.0 | 3.0 |",
        "| all | 10 | 8 | 4 | 3.33 | 0.67 | 5.0 | 3.0 |",
    ]


def test_nanochat_leaves_out_what_is_too_long() -> None:
    def refuse_long(i: int, model: Any, tokenizer: Any, examples: Any, *_: Any) -> bool:
        ids = tokenizer([examples[i]["query"] + " a"], prepend=tokenizer.get_bos_token_id())
        assert len(ids[0]) <= model.cos.size(1)
        return i == 0

    peer = bench.Peer.__new__(bench.Peer)
    peer.model = SimpleNamespace(cos=torch.zeros(1, 8))
    peer._core_eval = SimpleNamespace(evaluate_example=refuse_long)
    peer._tokenizer = bench._PeerTokenizer(TOKENIZER)
    examples = [{"query": query, "choices": ["a", "b"], "gold": 0} for query in ("x", "y", "z" * 6)]
    assert peer.decide(TASK, examples) == [True, False, None]
    peer.model.cos = torch.zeros(1, 9)
    assert peer.decide(TASK, examples) == [True, False, False]

    def fail(*_: Any) -> bool:
        raise AssertionError("another one")

    peer._core_eval = SimpleNamespace(evaluate_example=fail)
    with pytest.raises(AssertionError, match="another one"):
        peer.decide(TASK, examples)


def test_weights_are_those_of_the_model() -> None:
    model = GPT(tiny_config(backout=False, dropout=0.1))
    weights = weights_of(model)
    assert weights.keys() == {*model.state_dict(), "backout_lambda"}
    assert weights["backout_lambda"].tolist() == [0.0]
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)
    assert weights_of(GPT(tiny_config())).keys() == GPT(tiny_config()).state_dict().keys()
    with pytest.raises(ValueError, match=r"model.skips=True is not allowed: nanochat has False"):
        weights_of(GPT(tiny_config(skips=True)))
    with pytest.raises(ValueError, match=r"model.value_embeds=False"):
        weights_of(GPT(tiny_config("classic")))


def test_tasks_need_their_files() -> None:
    args = bench.Args(nanochat=Path(), core="x", tasks=("copa",))
    assert [task.label for task in bench.choose_tasks(args, {"copa.jsonl": Path()})] == ["copa"]
    with pytest.raises(ValueError, match=r"tasks=\('copa',\) is not allowed: .* files are in x"):
        bench.choose_tasks(args, {"piqa.jsonl": Path()})


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="count=10 is not allowed"):
        bench.Args(nanochat=Path(), core="x", count=10)
    with pytest.raises(ValueError, match=r"tasks='arc' is not allowed: hellaswag_zeroshot, "):
        bench.Args(nanochat=Path(), core="x", tasks=("arc",))
