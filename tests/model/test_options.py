"""Options of the architecture: against independent references, and off when they are off."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nanochat_ray.config import to_json
from nanochat_ray.model import attention, block
from nanochat_ray.model.attention import attend, attention_mask, block_mask
from nanochat_ray.model.block import MLP
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.fp8 import BACKWARD, FORWARD, fp8_linear, quantize
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.rotary import yarn_frequencies, yarn_sharpening
from tests.tiny import tiny_config


def build_model(**fields: object) -> GPT:
    model = GPT(tiny_config(**{"n_layer": 4, **fields}))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def test_masks_by_hand() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    assert attention_mask(ids, -1, None, flex=False) is None
    assert attention_mask(ids, 2, None, flex=False) is None  # the whole of three tokens
    one, own = (attention_mask(ids, window, None, flex=False) for window in (1, 0))
    assert isinstance(one, torch.Tensor)
    assert isinstance(own, torch.Tensor)
    assert one.tolist() == [[True, False, False], [True, True, False], [False, True, True]]
    assert own.tolist() == torch.eye(3, dtype=torch.bool).tolist()
    documents = torch.tensor([[0, 0, 1]])
    for mask in (
        attention_mask(ids, 1, None, flex=True),
        attention_mask(ids, -1, documents, flex=True),
    ):
        assert isinstance(mask, BlockMask)
        assert mask.seq_lengths == (3, 3)
    both = attention_mask(ids, -1, documents, flex=False)
    assert isinstance(both, torch.Tensor)
    assert both.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


@pytest.mark.parametrize("token", [256, 0])
def test_documents_do_not_see_each_other(token: int) -> None:
    model = build_model(document_start=token, vocab_size=257, window_pattern="SL", sequence_len=300)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 256, (1, n), generator=generator) for n in (40, 100, 7)]
    start = torch.full((1, 1), token)
    documents = [torch.cat((start, text), dim=1) for text in texts]
    with torch.no_grad():
        together = model(torch.cat(documents, dim=1))
        alone = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_attention_slides_beyond_the_context() -> None:
    """A context of 4: in the one layer a token sees itself and 4 before it, as nanochat's does."""
    model = build_model(n_layer=1, sequence_len=4, smear=False)
    ids = torch.arange(12)[None]
    other = ids.where(ids != 5, 99)
    with torch.no_grad():
        differs = (model(ids) != model(other)).any(-1)[0]
    assert differs.tolist() == [False] * 5 + [True] * 5 + [False] * 2


def test_attention_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the float32 results up to their rounding, in a model that computes in float32."""
    model, ids = build_model(), torch.arange(20)[None]
    dtypes: list[torch.dtype] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        dtypes.extend(x.dtype for x in (q, k, v))
        return attend(q, k, v, *rest)

    monkeypatch.setattr(block, "attend", spy)
    plain = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")
    assert dtypes == [torch.float32] * 3 * 4
    dtypes.clear()
    model.use_float64_attention()
    exact = model.loss(ids[:, :-1], ids[:, 1:], reduction="none")
    assert dtypes == [torch.float64] * 3 * 4
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact, plain, rtol=0, atol=2e-5)
    assert not torch.equal(exact, plain)
    exact.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    ("window", "T"), [(-1, 300), (5, 300), (128, 300), (150, 300), (1, 257), (129, 257)]
)
@pytest.mark.parametrize("has_documents", [True, False])
def test_block_mask_equals_dense_mask(window: int, T: int, has_documents: bool) -> None:
    torch.manual_seed(0)
    B, H, D = 2, 4, 16  # two blocks of 128 positions, and a part of one
    q = torch.randn(B, T, H, D)
    k, v = torch.randn(B, T, 2, D), torch.randn(B, T, 2, D)
    documents = (torch.rand(B, T) < 0.01).cumsum(dim=1) if has_documents else None
    ids = torch.zeros((B, T), dtype=torch.int64)
    dense = attend(q, k, v, attention_mask(ids, window, documents, flex=False), 0.3)
    mask = block_mask(T, T if window < 0 else window, documents, torch.device("cpu"))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    flex = flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
    assert isinstance(flex, torch.Tensor)
    torch.testing.assert_close(flex.transpose(1, 2), dense)


@pytest.mark.parametrize("window", [1, 5, 128, 129, 150, 512])
@pytest.mark.parametrize("starts", [[], [3, 127], [128, 200, 256]])
def test_blocks_are_those_of_all_pairs(window: int, starts: list[int]) -> None:
    """Which blocks of 128 × 128 have a visible pair, and which have no other, of 300 tokens."""
    documents = torch.zeros(1, 300, dtype=torch.int64)
    documents[0, starts] = 1
    documents = documents.cumsum(dim=1)
    i, j = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    visible = torch.zeros(384, 384, dtype=torch.bool)
    visible[:300, :300] = (j <= i) & (i <= j + window) & (documents == documents.T)
    blocks = visible.view(3, 128, 3, 128).transpose(1, 2).flatten(2)
    mask = block_mask(300, window, documents if starts else None, torch.device("cpu"))
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(-1))
    counts, indices = mask.full_kv_num_blocks, mask.full_kv_indices
    assert counts is not None
    assert indices is not None
    whole = [sorted(indices[0, 0, i, : counts[0, 0, i]].tolist()) for i in range(3)]
    assert whole == [row.nonzero()[:, 0].tolist() for row in blocks.all(-1)]


def test_block_mask_skips_and_fills_blocks() -> None:
    # Four blocks; a document ends with the second. Within a window of 128 a query's block sees
    # itself and, where the document goes on, the block before it: all in part.
    documents = torch.arange(512)[None] // 256
    mask = block_mask(512, 128, documents, torch.device("cpu"))
    assert mask.to_dense()[0, 0].tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks.tolist() == [[[0, 0, 0, 0]]]
    # Pairs are at most 255 apart in neighbouring blocks.
    for window, counts in ((255, [0, 1, 1, 1]), (254, [0, 0, 0, 0])):
        near = block_mask(512, window, None, torch.device("cpu"))
        assert near.full_kv_num_blocks is not None
        assert near.full_kv_num_blocks.tolist() == [[counts]]
    # Without a window all pairs of a block below the diagonal are visible.
    whole = block_mask(512, 512, None, torch.device("cpu"))
    assert whole.full_kv_num_blocks is not None
    assert whole.full_kv_num_blocks.tolist() == [[[0, 1, 2, 3]]]
    assert whole.kv_num_blocks.tolist() == [[[1, 1, 1, 1]]]


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
def test_yarn_is_that_of_transformers(factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": factor, "rope_theta": 1e5, "truncate": False}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=2048,
        rope_parameters={**scaling, "original_max_position_embeddings": 2048},
    )
    theirs, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    plain = 1e5 ** (-torch.arange(0, 64, 2) / 64)
    ours = yarn_frequencies(plain, 2048, factor)
    # They ramp over the channel's number, we, as the paper's formula does, over its turns: the
    # ends of the ramp agree.
    turns = 2048 * plain / (2 * math.pi)
    outside = (turns < 0.9) | (turns > 36)
    torch.testing.assert_close(ours[outside], theirs[outside], rtol=1e-5, atol=0)
    assert (ours <= plain).all()
    assert (ours >= plain / factor * 0.999).all()
    assert yarn_sharpening(factor) == pytest.approx(attention**2)


def test_options_start_without_effect() -> None:
    plain = GPT(tiny_config(n_layer=4))
    plain.init_weights(torch.Generator().manual_seed(0))
    other = GPT(tiny_config(n_layer=4, skips=True))
    other.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(plain(ids), other(ids))


def test_window_schedule_is_for_training() -> None:
    model = build_model(sequence_len=256)
    ids = torch.randint(0, 256, (1, 256), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids)
        model.window_share = 0.25
        assert torch.equal(model(ids), whole)
        model.train()
        short = model(ids)
    # Near and not equal: attention to another number of keys may sum in another order.
    torch.testing.assert_close(short[:, :64], whole[:, :64], atol=1e-5, rtol=0)
    assert (short[:, 128:] - whole[:, 128:]).abs().max() > 1e-3


def test_dropout_is_for_training() -> None:
    model = build_model(dropout=0.5)
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))


def test_dropout_is_of_the_stream_and_sublayers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a factor in place of the noise, the outputs of sublayers are that much larger."""
    calls: list[tuple[Any, ...]] = []

    def scale(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        calls.append((tuple(x.shape), p, training))
        return x * 2 if len(calls) > 1 else x

    monkeypatch.setattr(torch.nn.functional, "dropout", scale)
    model = build_model(dropout=0.25).train()
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = build_model()
    with torch.no_grad():
        for block in plain.blocks:
            block.attn.c_proj.weight *= 2
            block.mlp.c_proj.weight *= 2
        torch.testing.assert_close(model(ids), plain(ids))
    # The embedding, and in each of four layers the attention and the MLP.
    assert calls == [((2, 9, 32), 0.25, True)] * 9


def test_tables_outlive_inference_mode() -> None:
    """The angles are made in the first pass, which may be that of a validation."""
    model = build_model()
    ids = torch.randint(0, 256, (1, 8), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        model(ids)
    model.train().loss(ids, ids).backward()
    assert model.lm_head.weight.grad is not None


def test_fp8_matmuls_are_near_exact(fp8_on_any_cpu: None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 64, generator=generator).bfloat16().requires_grad_()
    # One matrix much smaller than fp8's range: the scales must bring it in.
    weight = (1e-4 * torch.randn(48, 64, generator=generator)).requires_grad_()
    g = torch.randn(4, 32, 48, generator=generator).bfloat16()
    result = fp8_linear(x, weight)
    exact_x, exact_w = x.detach().float().requires_grad_(), weight.detach().requires_grad_()
    exact = exact_x @ exact_w.T
    ours = torch.autograd.grad(result, (x, weight), g)
    theirs = torch.autograd.grad(exact, (exact_x, exact_w), g.float())
    assert result.dtype == torch.bfloat16
    assert ours[1].dtype == torch.float32
    # e4m3 keeps 3 bits of mantissa, e5m2 two: errors of single elements average out in the sums.
    for a, b, bound in (
        (result, exact, 0.05),
        (ours[0], theirs[0], 0.08),
        (ours[1], theirs[1], 0.08),
    ):
        assert (a.float() - b).norm() < bound * b.norm()


@pytest.mark.parametrize(("dtype", "largest"), [(FORWARD, 448.0), (BACKWARD, 57344.0)])
def test_fp8_scales_fill_the_range(dtype: torch.dtype, largest: float) -> None:
    values, scale = quantize(torch.tensor([0.5, -2.0, 0.0]), dtype)
    assert scale.item() == pytest.approx(2 / largest)
    assert values.float().tolist() == [largest / 4, -largest, 0.0]


def test_fp8_sums_fast_in_the_forward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fast: list[bool] = []

    def record(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        fast.append(options["use_fast_accum"])
        return torch.zeros((a.size(0), b.size(1)), dtype=options["out_dtype"])

    monkeypatch.setattr(torch, "_scaled_mm", record)
    x = torch.zeros((16, 32), dtype=torch.bfloat16, requires_grad=True)
    fp8_linear(x, torch.zeros((16, 32), requires_grad=True)).sum().backward()
    assert fast == [True, False, False]


def test_fp8_takes_the_large_matrices_only(fp8_on_any_cpu: None) -> None:
    model = GPT(ModelConfig.modern(vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=64,
                                   sequence_len=32), torch.bfloat16)  # fmt: skip
    model.init_weights(torch.Generator().manual_seed(0))
    model.use_fp8()
    block = next(iter(model.blocks))
    assert block.attn.c_q.fp8
    assert block.mlp.c_proj.fp8
    assert not model.lm_head.fp8
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
    exact = model.eval().loss(ids, ids)
    near = model.train().loss(ids, ids)
    near.backward()
    assert abs(near.item() - exact.item()) < 0.02
    assert block.attn.c_q.weight.grad is not None


def test_presets_are_nanochats() -> None:
    """July 2026, and October 2025 (transformers' NanoChatForCausalLM)."""
    shape = {"vocab_size": 99, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 2}
    modern, classic = (
        to_json(ModelConfig.preset(name, sequence_len=8, **shape)) for name in ("modern", "classic")
    )
    names = ("value_embeds", "residual_scalars", "smear", "backout")
    assert [modern[name] for name in names] == [True] * 4
    assert [classic[name] for name in names] == [False] * 4
    names = ("qk_scale", "softcap", "rope_base", "norm_eps", "pad_vocab_to")
    assert [modern[name] for name in names] == [1.2, 15, 100_000, 2**-23, 64]
    assert [classic[name] for name in names] == [1.0, 15, 10_000, 1e-6, 1]
    for config in (modern, classic):
        assert config["window_pattern"] == "L"
        names = ("skips", "attention_gate", "residual_decay", "dropout")
        assert not any(config[name] for name in names)
        assert (config["rope_factor"], config["document_start"]) == (1, -1)


@pytest.mark.parametrize(
    ("capability", "is_installed", "uses"),
    [((9, 0), True, True), ((9, 0), False, False), ((8, 0), True, False), ((10, 0), True, False)],
)
def test_flash_attention_3_is_for_hopper(
    capability: tuple[int, int], is_installed: bool, uses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: is_installed or None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", names.append)
    assert attention.use_flash_attention_3(torch.device("cuda")) is uses
    assert names == ["FA3"] * uses
    assert not attention.use_flash_attention_3(torch.device("cpu"))


def test_layers_run_again_for_their_gradients_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Tensor] = []
    forward = MLP.forward

    def record(mlp: MLP, x: Tensor) -> Tensor:
        runs.append(x)
        return forward(mlp, x)

    monkeypatch.setattr(MLP, "forward", record)
    model = build_model(skips=True).train()
    ids = torch.arange(12).view(2, 6)
    gradients = []
    for recompute, num_runs in ((False, 4), (True, 8)):
        model.checkpoint_activations = recompute
        model.zero_grad()
        runs.clear()
        model.loss(ids, ids).backward()
        assert len(runs) == num_runs
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        assert grad is not None, name
        assert torch.equal(grad, gradients[1][name]), name
