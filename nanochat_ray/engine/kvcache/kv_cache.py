"""What the runner needs of the memory of a KV cache, whatever its layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from numpy.typing import ArrayLike
from torch import Tensor

from nanochat_ray.engine.cuda_graphs import GraphLimits, StepGraphs
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.engine.step_plan import StepPlan

if TYPE_CHECKING:
    from nanochat_ray.engine.triton_forward import PagedKeys


class KVTarget(NamedTuple):
    """Where the keys and values of a step are written."""

    keys: Tensor
    """``[pages, block size, Hkv, D]``, like ``values``"""
    values: Tensor
    slot_mapping: Tensor
    """int64 ``[N]``: page times block size plus the index in the page."""


class KVCache(ABC):
    """Keys and values, and attention over them. Implements ``model.AttentionCache``.

    Invariants: ``prepare`` is called before each forward; ``attend`` then once for each layer;
    memory that no ``attend`` has written is zero, not garbage, since a masked value is multiplied
    by 0 and 0 * nan is nan.
    """

    positions: Tensor
    """int64 ``[N]``: the position of each token of the step in its sequence."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of all keys and values."""

    @abstractmethod
    def prepare(self, spans: ArrayLike) -> int:
        """Sets up a step of ``spans``, int64 rows as ``Span``: decodes, by ascending slot, then
        prompt chunks.

        Returns N, the tokens of the forward, of which the last few may be padding. Sets
        ``positions``.
        """

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """``q [N, H, D]``, ``k`` and ``v [N, Hkv, D]`` → ``[N, H, D]``. Writes the keys and values
        of the step first."""

    @property
    def pages(self) -> PagedKeys | None:
        """See ``model.AttentionCache``."""
        return None

    def step_graphs(self, model: InferenceModel, limits: GraphLimits) -> StepGraphs | None:
        """CUDA graphs of steps, not recorded yet, where there can be."""
        return None

    def step_plan(self, model: InferenceModel) -> StepPlan | None:
        """The forward as one call in C, where there can be one."""
        return None
