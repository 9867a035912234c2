"""Which part of each slot has memory. No torch.

A slot is address space for the longest sequence. Its memory is committed as its sequences grow, and
stays with it for the next one until it is needed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nanochat_ray.engine.kvcache.memory_budget import MemoryBudget


class SlotPages:
    """Invariant: what a sequence writes into its slot was committed before, within the budget."""

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        bytes_per_token: int,
        page_tokens: int,
        budget: MemoryBudget,
        release: Callable[[int], None] = lambda slot: None,
    ):
        """``page_tokens`` are committed together. ``release(slot)`` gives a slot's memory back to
        the system."""
        self.budget, self.bytes_per_token = budget, bytes_per_token
        self._max_model_len, self._page_tokens = max_model_len, page_tokens
        self._release = release
        self._num_tokens = [0] * num_slots
        """Tokens of each slot that have memory."""
        self._idle_slots = set(range(num_slots))
        """Those without a sequence."""

    def num_bytes(self, num_tokens: int) -> int:
        """Memory of a slot with so many tokens."""
        return self._whole_pages(num_tokens) * self.bytes_per_token

    def _whole_pages(self, num_tokens: int) -> int:
        pages = -(-num_tokens // self._page_tokens)
        return min(pages * self._page_tokens, self._max_model_len)

    def total_bytes(self, lengths: Iterable[tuple[int, int]]) -> int:
        """Memory of slots, given with the numbers of tokens that they must hold; what they have
        already is not less."""
        total, page = 0, self._page_tokens
        for slot, num_tokens in lengths:  # of each running sequence, for each that is admitted
            least = min(-(-num_tokens // page) * page, self._max_model_len)
            total += max(least, self._num_tokens[slot])
        return total * self.bytes_per_token

    @property
    def max_tokens(self) -> int:
        """Tokens that all slots together have memory for, at most."""
        most = len(self._num_tokens) * self._max_model_len
        return max(1, min(most, self.budget.limit // self.bytes_per_token))

    def num_tokens(self, slot: int) -> int:
        """Tokens of the slot that have memory."""
        return self._num_tokens[slot]

    def committed_bytes(self, slot: int) -> int:
        return self._num_tokens[slot] * self.bytes_per_token

    def is_used(self, slot: int) -> bool:
        return slot not in self._idle_slots

    def commit(self, slot: int, num_tokens: int) -> int:
        """The slot is in use, and has memory for ``num_tokens`` tokens if this returns 0. Else
        returns the bytes that the budget does not have."""
        self._idle_slots.discard(slot)
        if num_tokens <= self._num_tokens[slot]:
            return 0
        total = self._whole_pages(num_tokens)
        num_bytes = (total - self._num_tokens[slot]) * self.bytes_per_token
        if not self.budget.take(num_bytes):
            return num_bytes
        self._num_tokens[slot] = total
        return 0

    def free(self, slot: int) -> None:
        """The slot has no sequence any more; its memory stays until ``release_idle``."""
        self._idle_slots.add(slot)

    def release_idle(self) -> bool:
        """Gives back the memory of one slot without a sequence; False if none has any."""
        slot = max((s for s in self._idle_slots if self._num_tokens[s]), default=None)
        if slot is None:
            return False
        self.budget.give_back(self.committed_bytes(slot))
        self._num_tokens[slot] = 0
        self._release(slot)
        return True

    def check_integrity(self, used_slots: set[int], num_other_bytes: int) -> None:
        """AssertionError if a slot outside ``used_slots`` counts as used, or if the budget is not
        what slots and ``num_other_bytes`` take together."""
        assert {s for s in range(len(self._num_tokens)) if self.is_used(s)} <= used_slots
        slot_bytes = sum(self._num_tokens) * self.bytes_per_token
        assert self.budget.num_bytes == slot_bytes + num_other_bytes
