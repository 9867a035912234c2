"""Which optimizer and which learning rates each parameter of the model gets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from nanochat_ray.optim.config import OptimConfig

Kind = Literal["muon", "adamw"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share a rule. A group that is not elementwise holds matrices of one shape."""

    kind: Kind
    names: tuple[str, ...]
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float = 1e-10

    @property
    def is_elementwise(self) -> bool:
        """Whether the update of an element needs no other one, so that ranks may share them out
        anywhere; else a matrix is updated as a whole."""
        return self.kind != "muon"

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The state of a matrix of ``shape``, by name; of an element if that is ()."""
        if self.kind == "muon":
            m, n = shape
            return {"momentum": shape, "second_moment": (m, 1) if m >= n else (1, n)}
        return {"momentum": shape, "second_moment": shape}


# betas and decays: nanochat's gpt.py (July 2026), which tuned them at depth 12.
_ADAMW: tuple[tuple[str, str, float, float, float, float], ...] = (
    # prefix of the name, rate in OptimConfig, factor on it, beta1, beta2 (0: that of the
    # embeddings, from OptimConfig), weight decay
    ("lm_head.", "unembedding_lr", 1.0, 0.8, 0.96, 0.01),
    ("transformer.wte.", "embedding_lr", 1.0, 0.8, 0.0, 0.001),
    ("value_embeds.", "embedding_lr", 0.5, 0.8, 0.0, 0.01),
    ("resid_lambdas", "scalar_lr", 0.01, 0.8, 0.95, 0.05),
    ("x0_lambdas", "scalar_lr", 1.0, 0.96, 0.95, 0.0),
    ("smear_", "scalar_lr", 0.4, 0.8, 0.95, 0.0),
    ("backout_lambda", "scalar_lr", 0.4, 0.8, 0.95, 0.0),
    ("skip_", "scalar_lr", 0.1, 0.8, 0.95, 0.0),
    ("head_gate", "scalar_lr", 0.1, 0.8, 0.95, 0.0),
)


def build_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> tuple[Group, ...]:
    """Groups in an order that depends on the names alone. ValueError for an unknown parameter."""
    matrices: dict[tuple[int, ...], list[str]] = {}
    others: dict[tuple[float, float, float, float], list[str]] = {}
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        is_matrix = name.startswith("transformer.h.") and parameter.ndim == 2
        if is_matrix and "head_gate" not in name:
            matrices.setdefault(tuple(parameter.shape), []).append(name)
            continue
        rule = next((r for r in _ADAMW if name.startswith(r[0]) or f".{r[0]}." in name), None)
        if rule is None:
            raise ValueError(f"parameter {name!r} has no learning rate; see optim/groups.py")
        _, rate, factor, beta1, beta2, decay = rule
        beta2 = beta2 or config.embedding_beta2
        others.setdefault((getattr(config, rate) * factor, beta1, beta2, decay), []).append(name)
    adamw = [
        Group(kind="adamw", names=tuple(names), lr=k[0], beta1=k[1], beta2=k[2], weight_decay=k[3])
        for k, names in sorted(others.items())
    ]
    muon = [
        Group(
            kind="muon",
            names=tuple(names),
            lr=config.matrix_lr,
            weight_decay=config.weight_decay,
            beta1=config.momentum,
            beta2=0.9,
        )
        for _, names in sorted(matrices.items())
    ]
    return (*adamw, *muon)
