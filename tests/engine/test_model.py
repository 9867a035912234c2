"""The inference model against the training model, which it leaves alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_ray.checkpoint import hf
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kvcache import slot_cache
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.model.config import COMMON_OPTIONS, ModelConfig
from nanochat_ray.model.gpt import GPT
from tests.engine.engine_kit import (
    VOCAB,
    answer,
    ask,
    finish,
    make_engine,
    make_model,
    tokens,
    uncached_greedy,
)
from tests.tiny import TOKENIZER, tiny_config


class PlainCache:
    """The plainest cache: the same number of tokens of B sequences at a time, attention by the
    formula. Tokens of a step are ordered by sequence."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.positions = torch.empty(0, dtype=torch.int64)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        q, k, v = (x.unflatten(0, (self._batch, -1)) for x in (q, k, v))
        if layer in self._layers:
            k = torch.cat((self._layers[layer][0], k), dim=1)
            v = torch.cat((self._layers[layer][1], v), dim=1)
        self._layers[layer] = (k, v)
        group = q.size(2) // k.size(2)
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5
        distance = self.positions.view(self._batch, -1, 1) - torch.arange(k.size(1))
        is_masked = (distance < 0) | ((distance > window) if window >= 0 else False)
        scores = scores.masked_fill(is_masked[:, None], -torch.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(0, 1)


def random_model(**fields: Any) -> GPT:
    generator = torch.Generator().manual_seed(0)
    model = GPT(tiny_config(**fields))
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


OPTIONS: dict[str, dict[str, Any]] = {
    "modern": {},
    "classic": {"preset": "classic"},
    "windows": {"window_pattern": "SL"},
    "classic windows": {"preset": "classic", "window_pattern": "SL"},
    "one kv head": {"n_kv_head": 1},
    "skips": {"skips": True},
    "attention gate": {"attention_gate": True},
    "residual decay": {"residual_decay": 1.1},
    "documents": {"document_start": 256},
    "yarn": {"rope_factor": 4.0, "sequence_len": 100},
    "all": {"skips": True, "attention_gate": True, "rope_factor": 2.0, "window_pattern": "SSL"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cuts", [[0], [1, 2, 3], [150], [7, 100, 290]])
def test_prefill_chunks_give_equal_logits(option: str, cuts: list[int]) -> None:
    fields = {"preset": "modern", "sequence_len": 400, "n_layer": 4, **OPTIONS[option]}
    training = random_model(**fields)
    model = InferenceModel(training.config, training.state_dict())
    ids = torch.randint(0, 256, (2, 300), generator=torch.manual_seed(1))
    cache, chunks = PlainCache(batch=2), []
    with torch.inference_mode():
        whole = training(ids)
        for start, stop in zip([0, *cuts], [*cuts, 300], strict=True):
            if start == stop:
                continue
            cache.positions = torch.arange(start, stop).repeat(2)
            previous = ids.roll(1, dims=1)
            previous[:, 0] = -1
            tokens = ids[:, start:stop].flatten(), previous[:, start:stop].flatten()
            logits = model.logits(model.hidden(*tokens, cache))
            chunks.append(logits.unflatten(0, (2, -1)))
    assert (torch.cat(chunks, dim=1) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("preset", ["modern", "classic"])
def test_a_served_model_trains_as_before(preset: str, kernels: str) -> None:
    model = make_model.__wrapped__(preset)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(40).view(1, 40) % VOCAB

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    reference = gradients()
    engine = make_engine(model, kernels=kernels)
    tokens = answer(engine, ask("a", [1, 2, 3]))
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert all(torch.equal(*pair) for pair in zip(gradients(), reference, strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0  # the engine has weights of its own
    assert answer(engine, ask("b", [1, 2, 3])) == tokens


def test_a_served_model_exports(tmp_path: Path) -> None:
    model = random_model(preset="classic", vocab_size=TOKENIZER.vocab_size)
    engine = make_engine(model)
    assert answer(engine, ask("a", [1, 2, 3], max_tokens=8)) == uncached_greedy(model, [1, 2, 3], 8)
    hf.export(model, TOKENIZER, tmp_path, dtype=torch.float32)
    again, _ = hf.import_folder(tmp_path)
    assert torch.equal(again(torch.tensor([[1, 2, 3]])), model(torch.tensor([[1, 2, 3]])))


def other_model(preset: str, **fields: Any) -> GPT:
    """The same shape as ``make_model``, other weights."""
    model = make_model.__wrapped__(preset, **fields)
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    return model


def logprobs(engine: Engine) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities, prompts' included: long prompts that share a prefix."""
    prompts = [[(3 * j) % VOCAB for j in range(40)] + [i] for i in range(3)]
    for i, prompt in enumerate(prompts):
        top = 0 if i == 2 else None
        engine.add(ask(str(i), prompt, max_tokens=12, logprobs=0, prompt_logprobs=top))
    answers = []
    for outputs in (outputs_by_id for _, outputs_by_id in sorted(finish(engine).items())):
        values = [p.logprob for o in outputs for p in o.logprobs or () if p]
        values += [p.logprob for p in outputs[0].prompt_logprobs or ()]
        answers.append((tokens(outputs), values))
    return answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewConfig(ModelConfig):
    """With an option that only the training model knows so far."""

    parallel: bool = False


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    model = random_model(vocab_size=TOKENIZER.vocab_size)
    fields = vars(model.config)
    InferenceModel(NewConfig(**fields), model.state_dict())
    model.config = NewConfig(**fields, parallel=True)
    with pytest.raises(ValueError, match="the engine does not know parallel of ModelConfig"):
        make_engine(model)
    with pytest.raises(ValueError, match="cannot express parallel=True"):
        hf.export(model, TOKENIZER, tmp_path, dtype=torch.float32)


def test_without_a_plan_logits_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that the plan in C does not know yet takes the slower way."""
    model = make_model.__wrapped__("modern", skips=True)
    by_plan = logprobs(make_engine(model, kernels="generic"))
    monkeypatch.setattr(slot_cache, "OPTIONS", COMMON_OPTIONS - {"skips"})
    engine = make_engine(model, kernels="generic")
    assert engine.runner._plan is None
    assert logprobs(engine) == by_plan


DEFAULT_SETTINGS: list[dict[str, Any]] = [
    {},
    {"kv_layout": "paged"},
    {"precision": "bf16"},
    {"precision": "int8"},
    {"precision": "bf16", "kv_layout": "paged"},
    {"async_scheduling": "on"},
]
SETTINGS: list[dict[str, Any]] = [
    {"kernels": kernels, "kv_layout": layout}
    for kernels in ("generic", "torch")
    for layout in ("slots", "paged")
] + [{"kernels": "torch", "precision": "bf16"}, {"kernels": "torch", "precision": "int8"}]


@pytest.mark.kernels
@pytest.mark.parametrize("settings", DEFAULT_SETTINGS, ids=str)
@pytest.mark.parametrize("preset", ["modern", "classic"])
def test_loaded_weights_answer_as_a_new_engine(preset: str, settings: dict[str, Any]) -> None:
    check_loading(preset, settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("preset", ["modern", "classic"])
def test_other_kernels_load_weights(preset: str, settings: dict[str, Any]) -> None:
    check_loading(preset, settings)


def check_loading(preset: str, settings: dict[str, Any]) -> None:
    other = other_model(preset)
    engine, new = make_engine(make_model(preset), **settings), make_engine(other, **settings)
    first = logprobs(engine)
    engine.load_weights(other.state_dict())
    assert logprobs(engine) == logprobs(new)
    engine.load_weights(make_model(preset).state_dict())
    assert logprobs(engine) == first  # and nothing of the other weights is cached


@pytest.mark.kernels
@pytest.mark.parametrize("settings", [{}, {"kv_layout": "paged"}, {"async_scheduling": "on"}])
def test_running_requests_use_new_weights(settings: dict[str, Any]) -> None:
    other = other_model("modern")
    engine = make_engine(make_model("modern"), num_speculative_tokens=0, **settings)
    engine.add(ask("a", [1, 2, 3], max_tokens=20))
    outputs = [output for _ in range(8) for output in engine.step()]
    engine.load_weights(other.state_dict())
    engine.check_integrity()
    first_tokens = tokens(outputs) + tokens([o for o in engine._ready if o.request_id == "a"])
    assert 4 < len(first_tokens) < 12
    rest = tokens(finish(engine)["a"])
    new = make_engine(other, num_speculative_tokens=0)
    reference = answer(new, ask("a", [1, 2, 3], first_tokens, max_tokens=20))
    assert [*tokens(outputs), *rest] == [*first_tokens, *reference]


def test_loading_keeps_addresses() -> None:
    for kernels in ("auto", "torch"):
        model = make_engine(make_model("modern"), kernels=kernels).runner.model
        before = addresses(model)
        model.load_weights(other_model("modern").state_dict())
        assert addresses(model) == before
        # One matmul instead of three projections in each of the two layers.
        assert len(before) == len(make_model("modern").state_dict()) - 2 * 2


def addresses(model: InferenceModel) -> list[int]:
    matmuls = [layer.weight for layer in model.linears.values()]
    return [tensor.data_ptr() for tensor in (*matmuls, *model.tensors.values())]


WRONG: dict[str, Any] = {
    "lm_head.weight is missing": lambda w: w.pop("lm_head.weight"),
    r"lm_head.weight has the shape \(3, 64\), expected \(320, 64\)": lambda w: w.update(
        {"lm_head.weight": torch.zeros(3, 64)}
    ),
    "x.y is not a tensor of this model": lambda w: w.update({"x.y": torch.zeros(3)}),
    "resid_lambdas has the dtype torch.int64": lambda w: w.update(
        {"resid_lambdas": torch.zeros(2, dtype=torch.int64)}
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_weights_change_nothing(message: str) -> None:
    engine = make_engine(make_model("modern"))
    engine.add(ask("a", [1, 2, 3], max_tokens=9))
    first_tokens = [token for _ in range(3) for o in engine.step() for token in o.tokens]
    weights = other_model("modern").state_dict()
    WRONG[message](weights)
    with pytest.raises(ValueError, match=f"weights: {message}"):
        engine.load_weights(weights)
    with pytest.raises(ValueError, match=f"weights: {message}"):
        InferenceModel(make_model("modern").config, weights)
    new = make_engine(make_model("modern"))
    assert [*first_tokens, *tokens(finish(engine)["a"])] == answer(
        new, ask("a", [1, 2, 3], max_tokens=9)
    )


@pytest.mark.slow
def test_startup_does_not_import_compile() -> None:
    """Importing it takes seconds, which a start on a CPU need not wait for."""
    code = (
        "import sys; from tests.engine.engine_kit import make_engine, make_model;"
        "make_engine(make_model('modern')); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
