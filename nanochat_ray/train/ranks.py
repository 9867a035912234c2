"""The ranks of a run as a group that waits: for a rank that reads, writes or fails.

Collectives of a step end with an error after the process group's timeout, as they must: a rank is
dead or stuck. A rank that loads a checkpoint or uploads one is neither. Whatever one rank may do
for long while the others wait goes through ``run_together``, which has a group of its own.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=30)
"""How long ranks wait for each other's storage. A rank that dies closes its connections, which the
others see at once; a machine that falls silent is for Ray or torchrun to notice."""
_KINDS: tuple[type[Exception], ...] = (ValueError, FloatingPointError, OSError)
_BYTES = 1024
"""Size of a rank's outcome: the kind of its error, and the first characters of its text."""


class Ranks:
    """This process among those of the default process group; alone if there is none."""

    def __init__(self, device: torch.device | None = None):
        in_group = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if in_group else 0
        self.world = dist.get_world_size() if in_group else 1
        self.device = device or torch.device("cpu")
        backend = "gloo" if self.device.type == "cpu" else None
        self._group = dist.new_group(timeout=PATIENCE, backend=backend) if self.world > 1 else None

    def run_together(self, work: Callable[[], T]) -> T:
        """The result of this rank's ``work``, when every rank has done its own. Collective.

        If it raises on any rank it raises on all: the same error where that is one of those that
        end a run with a line of text, else RuntimeError.
        """
        if self._group is None:
            return work()
        try:
            result = work()
        except Exception as error:
            self._exchange(error)
            raise
        self._exchange(None)
        return result

    def run_on_first(self, work: Callable[[], object]) -> None:
        """Rank 0 does ``work`` while the others wait. Collective; raises as ``run_together``."""
        self.run_together(work if self.rank == 0 else lambda: None)

    def gather(self, data: bytes) -> list[bytes]:
        """The ``data`` of each rank, in their order, on all ranks. Collective."""
        if self._group is None:
            return [data]
        own = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=self.device), group=self._group)
        width = max(1, *(int(size) for size in sizes))
        own = torch.nn.functional.pad(own, (0, width - len(own)))
        tensors = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(tensors, own, group=self._group)
        return [
            tensor.cpu().numpy().tobytes()[: int(size)]
            for tensor, size in zip(tensors, sizes, strict=True)
        ]

    def _exchange(self, error: Exception | None) -> None:
        """Raises another rank's error, if there is one and this rank has none itself."""
        own = torch.zeros(_BYTES, dtype=torch.uint8)
        if error is not None:
            kind = next((i for i, k in enumerate(_KINDS) if isinstance(error, k)), len(_KINDS))
            text = str(error) if kind < len(_KINDS) else f"{type(error).__name__}: {error}"
            data = bytes([kind + 1]) + text.encode(errors="replace")[: _BYTES - 1]
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        own = own.to(self.device)
        outcomes = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(outcomes, own, group=self._group)
        if error is not None:
            return
        for rank, outcome in enumerate(outcomes):
            kind, *text_bytes = outcome.cpu().numpy().tobytes()
            if kind:
                text = bytes(text_bytes).rstrip(b"\0").decode(errors="replace")
                if kind <= len(_KINDS):
                    raise _KINDS[kind - 1](text)
                raise RuntimeError(f"rank {rank}: {text}")
