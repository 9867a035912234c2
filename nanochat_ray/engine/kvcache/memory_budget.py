"""How much memory an engine may commit while it runs. No torch."""

from __future__ import annotations

from collections.abc import Callable

STEP = 64 << 20
"""Bytes that are committed between two questions to the machine for its free memory."""


class MemoryBudget:
    """At most ``limit`` bytes, and only as far as the machine has more than ``reserve`` left.

    Other processes take memory too, among them other engines, so a limit that was right when the
    engine started may be too high later: what is asked for then is refused, before the system
    would end a process.
    """

    def __init__(self, limit: int, reserve: int = 0, free_memory: Callable[[], int] | None = None):
        """``free_memory`` returns the machine's free bytes; None: there is always enough."""
        self.limit, self._reserve, self._free_memory = limit, reserve, free_memory
        self.num_bytes = 0
        """Bytes that are in use."""
        self._checked_bytes = 0 if free_memory else limit
        """Bytes up to which ``num_bytes`` may grow before the machine is asked again."""

    def can_hold(self, total: int) -> bool:
        """Whether ``num_bytes`` may be this many bytes."""
        if total > self.limit:
            return False
        if total > self._checked_bytes and self._free_memory is not None:
            free = self._free_memory() - self._reserve
            growth = min(free, max(STEP, total - self.num_bytes))
            self._checked_bytes = self.num_bytes + max(0, growth)
        return total <= max(self._checked_bytes, self.num_bytes)

    def take(self, count: int) -> bool:
        """Whether there are so many more bytes; then they are in use."""
        if not self.can_hold(self.num_bytes + count):
            return False
        self.num_bytes += count
        return True

    def give_back(self, count: int) -> None:
        self.num_bytes -= count
        if self._free_memory is not None:
            self._checked_bytes -= count
