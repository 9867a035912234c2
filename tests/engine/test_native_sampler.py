"""Sampling in C gives the tokens of ``SamplingState`` with torch, whatever a row uses."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat_ray.engine import kernels as kernels_module
from nanochat_ray.engine import sampler, slot_parameters
from nanochat_ray.engine.kernels import available, load_kernels
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.engine.sampling_state import SamplingState
from nanochat_ray.engine.sequence import Sequence
from tests.engine.engine_kit import needs_compiler

pytestmark = needs_compiler
CPU = torch.device("cpu")
SLOTS = 24
RECORDED_PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "logit_bias": {3: 5.0}, "presence_penalty": 1.0},
]
RECORDED_TOKENS = [
    [21, 251, 74, 323, 144, 456, 145],
    [21, 294, 155, 413, 168, 233, 20],
    [21, 177, 279, 276, 168, 297, 491],
]


def random_params(rng: random.Random, vocab: int) -> dict[str, Any]:
    params: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.0, 2.0, 1e-6, 1e9]),
        "top_k": rng.choice([0, 0, 1, 3, 50, 1000, 10**6]),
        # No simple fractions: of equal weights rounding would decide which they are.
        "top_p": rng.choice([1.0, 1.0, 1e-9, 0.0987, 0.5123, 0.9513, 0.9999]),
        "min_p": rng.choice([0.0, 0.0, 0.01, 0.4, 1.0]),
        "max_tokens": 1000,
    }
    if rng.random() < 0.3:
        params |= {"repetition_penalty": rng.choice([1.0, 1.3, 0.7]), "presence_penalty": 0.3}
        params |= {"frequency_penalty": rng.choice([-0.4, 0.0, 0.7])}
    if rng.random() < 0.2:
        params["logit_bias"] = {rng.randrange(vocab): rng.uniform(-9, 9) for _ in range(4)}
    if rng.random() < 0.2:
        params |= {"min_tokens": rng.choice([2, 100]), "stop_ids": (rng.randrange(vocab), 0)}
    return params


def admit(states: list[SamplingState], params: list[dict[str, Any]], vocab: int) -> None:
    """Requests of 6 prompt tokens and 4 output tokens, request i in slot i."""
    rng = random.Random(9)
    for slot, fields in enumerate(params):
        tokens = [rng.randrange(vocab) for _ in range(10)]
        request = Request(id=str(slot), prompt=tokens[:6], params=SamplingParams(**fields))
        stops = frozenset(request.params.all_stop_ids)
        seed = rng.getrandbits(64)
        for state in states:
            state.admit(Sequence(request, tokens, seed, 10**6, slot=slot, stop_token_ids=stops))


def random_logits(rng: random.Random, rows: int, vocab: int) -> Tensor:
    """Some rows with few different values, with -inf, or not finite."""
    noise = torch.Generator().manual_seed(rng.getrandbits(32))
    logits = torch.randn((rows, vocab), generator=noise) * rng.choice([0.1, 2.0, 8.0])
    for row in range(0, rows, 5):
        logits[row] = (logits[row] * 2).round() / 2
    logits[1, torch.rand(vocab, generator=noise) < 0.7] = -torch.inf
    logits[2] = 1.5
    logits[3] = -torch.inf
    logits[4, rng.randrange(vocab)] = rng.choice([torch.inf, torch.nan])
    return logits


@pytest.mark.parametrize("level", available())
@pytest.mark.parametrize("vocab", [5, 16, 17, 300, 4099, 32768])
def test_same_tokens_as_torch(vocab: int, level: str) -> None:
    rng = random.Random(vocab)
    native = load_kernels(64, 1, level)
    if native is None:
        pytest.skip(f"this compiler does not know {level}")
    states = [SamplingState(SLOTS, vocab, CPU, kernels) for kernels in (native, None)]
    for _ in range(1 if vocab > 10_000 else 6):
        admit(states, [random_params(rng, vocab) for _ in range(SLOTS)], vocab)
        slots = [rng.randrange(SLOTS) for _ in range(40)]
        positions = [rng.randrange(10, 10_000) if s % 2 else 10 for s in slots]
        pairs = [(rng.randrange(40), rng.randrange(min(vocab, 9))) for _ in range(30)]
        rows = rng.sample(range(40), 7)
        mask = np.array([[rng.random() < 0.5 for _ in range(vocab)] for _ in rows])
        mask[0, :], mask[1, 1:] = False, False
        # Every second value of a wider matmul's row.
        logits = torch.cat([random_logits(rng, 40, vocab), torch.zeros(40, 7)], dim=1)[:, :vocab]
        before = logits.clone()
        for masks, uncounted_pairs in ((None, []), (([*rows], mask), pairs)):
            result, want = (
                state.choose(logits, slots, positions, masks, uncounted_pairs) for state in states
            )
            assert result.tolist() == want.tolist()
        assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7))  # others read them too
        new_tokens = (
            [rng.randrange(SLOTS) for _ in range(9)],
            [rng.randrange(vocab) for _ in range(9)],
        )
        for state in states:
            state.count(*new_tokens)


def test_rows_do_not_depend_on_batch_or_threads() -> None:
    rng = random.Random(3)
    state = SamplingState(SLOTS, 900, CPU, load_kernels(64, 1))
    admit([state], [random_params(rng, 900) for _ in range(SLOTS)], 900)
    logits, slots = random_logits(rng, SLOTS, 900), list(range(SLOTS))
    together = state.choose(logits, slots, [77] * SLOTS).tolist()
    alone = [int(state.choose(logits[s : s + 1], [s], [77])) for s in slots]
    assert alone == together
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert state.choose(logits, slots, [77] * SLOTS).tolist() == together
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_recorded_tokens(kernels: str) -> None:
    """A change of any of these changes the answers of every request with a seed."""
    native = load_kernels(64, 1) if kernels == "auto" else None
    state = SamplingState(SLOTS, 500, CPU, native)
    admit([state], RECORDED_PARAMS, 500)
    # Multiples of 1/16 from -4 to 4, the same on every machine.
    logits = torch.tensor([[(i * i * 7 + i * 31 + r) % 129 / 16 - 4 for i in range(500)]
                           for r in range(len(RECORDED_PARAMS))])  # fmt: skip
    slots = list(range(len(RECORDED_PARAMS)))
    tokens = [state.choose(logits, slots, [at] * len(slots)).tolist() for at in (10, 11, 500)]
    assert tokens == RECORDED_TOKENS


def test_weight_of_ties_at_the_edge_of_top_k() -> None:
    """Top-p takes its share of the weight of exactly k tokens: of 2 + 2 + 1 for k = 3, where three
    tokens of weight 1 tie, 0.75 needs both tokens of weight 2 and 0.85 a third, with its ties."""
    logits = torch.tensor([[2.0, 1.0, 2.0, 1.0, 1.0]]).log()
    for top_p, want_ids in ((0.75, {0, 2}), (0.85, {0, 1, 2, 3, 4})):
        state = SamplingState(1, 5, CPU, load_kernels(64, 1))
        admit([state], [{"temperature": 1.0, "top_k": 3, "top_p": top_p}], 5)
        samples = {int(state.choose(logits, [0], [at])) for at in range(300)}
        assert samples == want_ids


def test_rows_without_finite_logits_are_invalid() -> None:
    state = SamplingState(1, 40, CPU, load_kernels(64, 1))
    admit([state], [{"temperature": 0.0}], 40)
    for value, at in ((torch.nan, 39), (torch.inf, 0)):
        logits = torch.zeros(1, 40)
        logits[0, at] = value
        assert state.choose(logits, [0], [10]).tolist() == [sampler.INVALID]
    assert state.choose(torch.full((1, 40), -torch.inf), [0], [10]).tolist() == [sampler.INVALID]


def test_penalties_round_as_torch_does() -> None:
    """A frequency's product is rounded before it is subtracted. Where that matters, the penalised
    token ties with one of a smaller id, and a fused multiply-add would make it the likeliest."""
    frequency, noise = torch.tensor(0.1), torch.Generator().manual_seed(0)
    logits = torch.rand(100, generator=noise)
    exact = (logits.double() - frequency.double() * 3).float()
    logit = logits[exact > logits - frequency * 3][0]
    row = torch.full((1, 8), -9.0)
    row[0, 2], row[0, 5] = logit - frequency * 3, logit
    state = SamplingState(1, 8, CPU, load_kernels(64, 1))
    params = SamplingParams(temperature=0.0, frequency_penalty=0.1)
    state.admit(Sequence(Request(id="", prompt=[0], params=params), [0], 0, 99, slot=0))
    state.count([0, 0], [5, 5])
    assert state.choose(row, [0], [10], None, [(0, 5)]).tolist() == [2]
    assert state.choose(row, [0], [10]).tolist() == [5]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_grammar_wins_over_bans(kernels: str) -> None:
    native = load_kernels(64, 1) if kernels == "auto" else None
    state = SamplingState(1, 8, CPU, native)
    admit([state], [{"temperature": 0.0, "min_tokens": 9, "stop_ids": (3,)}], 8)
    logits = torch.arange(8.0)[None]
    allowed_ids = np.zeros((1, 8), dtype=bool)
    allowed_ids[0, 3] = True
    assert state.choose(logits, [0], [10], ([0], allowed_ids)).tolist() == [3]
    allowed_ids[0, 1] = True
    assert state.choose(logits, [0], [10], ([0], allowed_ids)).tolist() == [1]
    assert state.choose(logits, [0], [15], ([0], allowed_ids)).tolist() == [3]


def test_c_knows_every_feature() -> None:
    """It would ignore another; NUCLEUS helps torch alone."""
    source = (Path(kernels_module.__file__).parent / "csrc" / "sampling.c").read_text()
    names = re.findall(r"\b([A-Z_]+) = (\d+)", source[: source.index("};")])
    c_flags = {name: int(value) for name, value in names}
    flags = {
        name: value
        for module in (sampler, slot_parameters)
        for name, value in vars(module).items()
        if name[0].isupper() and isinstance(value, int) and value > 0
    }
    assert c_flags == {name: value for name, value in flags.items() if name != "NUCLEUS"}
