"""The forward pass against its formulas in float64, written for one sequence and read in a minute.

Each formula has one place here: rotary embedding, QK-norm, windows, value embeddings, smear,
residual scalars, skips, backout, gates and the softcap.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.rotary import rotary_tables

EPS = torch.finfo(torch.float32).eps
BOUND = 60 * EPS
"""Of the largest logit: roundings of some 15 operations in each of 4 layers."""


def norm(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def rotate(x_THD: Tensor, c: ModelConfig) -> Tensor:
    """Pair (i, i + D/2) turns by minus position · base^(-2i/D), or by YaRN's share of that."""
    T, _, D = x_THD.shape
    frequency = c.rope_base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    turns = c.sequence_len * frequency / (2 * math.pi)
    share = ((turns - 1) / 31).clamp(0, 1)
    frequency = frequency * (share + (1 - share) / c.rope_factor)
    angle = torch.outer(torch.arange(T, dtype=torch.float64), frequency)
    z = torch.complex(x_THD[..., : D // 2], x_THD[..., D // 2 :]) * torch.exp(-1j * angle)[:, None]
    return torch.cat((z.real, z.imag), dim=-1)


def reference(
    c: ModelConfig, w: dict[str, Tensor], ids: Tensor, windows: list[int], start: int = -1
) -> Tensor:
    """Logits ``[T, V]`` of ``ids [T]`` by float64 weights; a window of -1 is everything before."""
    T, n = len(ids), c.n_layer
    x = norm(w["transformer.wte.weight"][ids], c.norm_eps)
    if c.smear:
        gate = torch.sigmoid(x[:, :24] @ w["smear_gate.weight"].T) * w["smear_lambda"]
        gate[0] = 0
        gate[ids == start] = 0
        x = x + gate * x.roll(1, dims=0)
    document = (ids == start).cumsum(0).tolist()
    x0, outputs = x, []
    for i in range(n):
        p = f"transformer.h.{i}."
        if c.residual_scalars:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        if c.skips and i >= n - n // 2:
            j = n - 1 - i
            gate = torch.sigmoid(x0[:, :12] @ w[f"skip_gates.{j}.weight"].T)
            x = x + w["skip_lambdas"][j] * gate * outputs[j]
        h = norm(x, c.norm_eps)
        q, k, v = ((h @ w[f"{p}attn.c_{name}.weight"].T).view(T, -1, c.head_dim) for name in "qkv")
        if c.value_embeds and i % 2 == (n - 1) % 2:
            gate = 3 * torch.sigmoid(h[:, :12] @ w[f"{p}attn.ve_gate.weight"].T)
            v = v + gate[:, :, None] * w[f"value_embeds.{i}.weight"][ids].view_as(v)
        q, k = (norm(rotate(a, c), c.norm_eps) for a in (q, k))
        y = torch.zeros(T, c.n_head, c.head_dim, dtype=torch.float64)
        for t in range(T):
            first = max(0, t - windows[i]) if windows[i] >= 0 else 0
            near = [s for s in range(first, t + 1) if document[s] == document[t]]
            for head in range(c.n_head):
                kv = head * c.n_kv_head // c.n_head
                scores = k[near, kv] @ q[t, head] * c.qk_scale**2 / math.sqrt(c.head_dim)
                scores *= (0.1 * math.log(c.rope_factor) + 1) ** 2
                y[t, head] = scores.softmax(0) @ v[near, kv]
        if c.attention_gate:
            y = y * torch.sigmoid(h[:, :12] @ w[f"{p}attn.head_gate.weight"].T)[:, :, None]
        x = x + y.view(T, -1) @ w[f"{p}attn.c_proj.weight"].T
        h = norm(x, c.norm_eps)
        x = x + (h @ w[f"{p}mlp.c_fc.weight"].T).relu().square() @ w[f"{p}mlp.c_proj.weight"].T
        outputs.append(x)
    if c.backout:
        x = x - w["backout_lambda"] * outputs[n // 2]
    logits = norm(x, c.norm_eps) @ w["lm_head.weight"][: c.vocab_size].T
    return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits


def random_model(**fields: Any) -> tuple[GPT, dict[str, Tensor]]:
    shape = {"vocab_size": 70, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    preset = fields.pop("preset", "modern")
    model = GPT(ModelConfig.preset(preset, **{**shape, "sequence_len": 300, **fields}))
    generator = torch.Generator().manual_seed(len(fields))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.7 if p.ndim == 1 else 0.3)
    return model, {name: p.detach().double() for name, p in model.named_parameters()}


OPTIONS: dict[str, dict[str, Any]] = {
    "modern": {},
    "classic": {"preset": "classic"},
    "windows": {"window_pattern": "SSL"},
    "skips": {"skips": True},
    "skips of five layers": {"skips": True, "n_layer": 5, "backout": False},
    "attention gate": {"attention_gate": True},
    "documents": {"document_start": 3, "window_pattern": "SL"},
    "no softcap": {"softcap": 0.0, "smear": False},
    "no scalars": {"residual_scalars": False, "n_layer": 3},
    "yarn": {"rope_factor": 4.0, "rope_base": 1000.0},
    "epsilon": {"norm_eps": 0.5, "qk_scale": 0.7, "rope_base": 50.0, "value_embeds": False},
}


# 150 tokens are more than the short window of 128 (a quarter of 300, rounded up to 128).
@pytest.mark.parametrize("num_tokens", [10, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("option", OPTIONS)
def test_logits_are_the_references(option: str, num_tokens: int) -> None:
    model, weights = random_model(**OPTIONS[option])
    c = model.config
    ids = torch.randint(0, 70, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    windows = [128 if c.window_pattern[i % len(c.window_pattern)] == "S" else -1
               for i in range(c.n_layer)]  # fmt: skip
    windows[-1] = -1
    with torch.no_grad():
        logits = model.eval()(ids)
        for row in range(2):
            golden = reference(c, weights, ids[row], windows, c.document_start)
            assert (logits[row] - golden).abs().max() < BOUND * golden.abs().max()


@pytest.mark.parametrize(
    ("share", "short", "full"), [(0.5, 64, 64), (0.75, 128, 128), (1, 128, -1)]
)
def test_growing_windows_are_the_references(share: float, short: int, full: int) -> None:
    """Of 128 and of 150 tokens, in steps of 64; one and a half steps are two."""
    model, weights = random_model(window_pattern="SL", n_layer=2)
    model.train().window_share = share
    ids = torch.randint(0, 70, (150,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        golden = reference(model.config, weights, ids, [short, full])
        assert (model(ids[None])[0] - golden).abs().max() < BOUND * golden.abs().max()


def test_loss_is_the_references() -> None:
    model, weights = random_model()
    ids = torch.randint(0, 70, (40,), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1)
    targets[::5] = -1
    logits = reference(model.config, weights, ids, [-1] * 4)
    golden = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum").item()
    for reduction, value in (("sum", golden), ("mean", golden / 32)):
        loss = model.loss(ids[None], targets[None], reduction).item()  # type: ignore[arg-type]
        assert loss == pytest.approx(value, rel=1e-4)
    assert model.loss(ids[None], targets[None], "none").sum().item() == pytest.approx(
        golden, rel=1e-4
    )


@pytest.mark.parametrize("factor", [1.0, 1.5, 4.0])
def test_rotary_tables_by_the_formula(factor: float) -> None:
    """YaRN, section 3.2: a channel that turns less than once over the trained context is slowed
    by the factor, one that turns 32 times or more is not, between them linearly."""
    cos, sin = rotary_tables(50, 8, 100.0, train_length=400, factor=factor)
    for i in range(4):
        frequency = 100.0 ** (-2 * i / 8)
        turns = 400 * frequency / (2 * math.pi)
        keep = min(max((turns - 1) / 31, 0.0), 1.0)
        if factor > 1:
            frequency *= keep + (1 - keep) / factor
        for position in (0, 1, 49):
            angle = position * frequency
            assert cos[position, i].item() == pytest.approx(math.cos(angle), abs=1e-5)
            assert sin[position, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
    assert cos.shape == sin.shape == (50, 4)
