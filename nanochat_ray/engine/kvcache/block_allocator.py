"""Block tables of sequences, over one pool for each attention window. No torch.

Both layouts stand on it. With paged memory a sequence references blocks and shares those of a
common prefix. With contiguous slots the blocks are copies of prefixes, which no sequence
references (``insert_prefix``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE, NULL_BLOCK, BlockPool, hash_blocks

BlockTables = list[list[int]]
"""For each pool the block ids of one sequence, in the order of its tokens."""


class BlockAllocator:
    """Invariants: all tables of a sequence have the same length; a failed ``extend`` allocates
    nothing; freed blocks keep their content until they are evicted."""

    def __init__(self, pools: Sequence[BlockPool], max_step_tokens: int = 1):
        """``max_step_tokens``: how many tokens of a sequence one step computes at most."""
        self.pools, self.max_step_tokens = tuple(pools), max_step_tokens

    def empty_tables(self) -> BlockTables:
        return [[] for _ in self.pools]

    @property
    def usage(self) -> float:
        """Referenced share of the pool with the fewest free blocks."""
        return max(1 - pool.num_free_blocks / pool.capacity for pool in self.pools)

    def max_blocks(self, pool: BlockPool, num_tokens: int) -> int:
        """Blocks that a sequence of this length references at one time, at most."""
        total = -(-num_tokens // BLOCK_SIZE)
        if pool.window < 0:
            return total
        return min(total, -(-(pool.window + self.max_step_tokens) // BLOCK_SIZE) + 1)

    def _num_behind_window(self, pool: BlockPool, start: int) -> int:
        """Leading blocks that no token from ``start`` on attends to."""
        return 0 if pool.window < 0 else max(0, start - pool.window) // BLOCK_SIZE

    def can_admit(self, num_tokens: int, running: Iterable[tuple[BlockTables, int]]) -> bool:
        """Whether a sequence of this length fits beside the running ones, given as (block tables,
        number of tokens), once those have the blocks that they need."""
        running = list(running)
        for i, pool in enumerate(self.pools):
            num_needed = self.max_blocks(pool, num_tokens)
            for tables, length in running:
                num_present = len(tables[i]) - tables[i].count(NULL_BLOCK)
                num_needed += max(0, self.max_blocks(pool, length) - num_present)
            if num_needed > pool.num_free_blocks:
                return False
        return True

    def extend(self, tables: BlockTables, start: int, end: int) -> bool:
        """Frees blocks behind the window of token ``start`` and allocates blocks up to token
        ``end``, in all pools or (False) in none."""
        num_new = -(-end // BLOCK_SIZE) - len(tables[0])
        for pool, block_ids in zip(self.pools, tables, strict=True):
            for i in range(min(self._num_behind_window(pool, start), len(block_ids)) - 1, -1, -1):
                if block_ids[i] == NULL_BLOCK:
                    break
                pool.free(block_ids[i : i + 1])
                block_ids[i] = NULL_BLOCK
        if any(pool.num_free_blocks < num_new for pool in self.pools):
            return False
        for pool, block_ids in zip(self.pools, tables, strict=True):
            block_ids.extend(pool.allocate() for _ in range(num_new))
        return True

    def free(self, tables: BlockTables) -> None:
        for pool, block_ids in zip(self.pools, tables, strict=True):
            pool.free(block_ids)

    def match_prefix(self, tokens: Sequence[int], limit: int, scope: str = "") -> BlockTables:
        """References the longest cached prefix of ``tokens[:limit]``, in full blocks.

        A pool with a window must contain only the blocks that the next token attends to.
        """
        hashes = hash_blocks(tokens, limit, scope)
        num_matched = 0
        runs = [0] * len(self.pools)  # cached blocks up to here without a gap, by pool
        for count, block_hash in enumerate(hashes, 1):
            runs = [
                run + 1 if pool.contains(block_hash) else 0
                for run, pool in zip(runs, self.pools, strict=True)
            ]
            if not any(runs):
                break
            end = count * BLOCK_SIZE
            visible = (count - self._num_behind_window(pool, end) for pool in self.pools)
            if all(run >= needs for run, needs in zip(runs, visible, strict=True)):
                num_matched = count
        tables: BlockTables = []
        for pool in self.pools:
            first = self._num_behind_window(pool, num_matched * BLOCK_SIZE)
            visible_ids = [pool.touch(block_hash) for block_hash in hashes[first:num_matched]]
            tables.append([NULL_BLOCK] * first + visible_ids)
        return tables

    def commit(
        self, tables: BlockTables, tokens: Sequence[int], limit: int, scope: str = ""
    ) -> None:
        """The full blocks of ``tokens[:limit]``, which are computed, can be matched from now on."""
        hashes = hash_blocks(tokens, limit, scope)
        for pool, block_ids in zip(self.pools, tables, strict=True):
            for block_id, block_hash in zip(block_ids, hashes, strict=False):
                if block_id != NULL_BLOCK:
                    pool.set_hash(block_id, block_hash)

    def insert_prefix(
        self,
        tokens: Sequence[int],
        limit: int,
        scope: str = "",
        grow: Callable[[int], None] = lambda num_missing: None,
    ) -> list[tuple[int, int]]:
        """Adds the blocks of ``tokens[:limit]`` that are not cached, without references. One pool.

        Returns (index of the block in the sequence, block id) of each, which the caller must write
        now. ``grow(n)`` may enlarge the pool by n blocks before others are evicted. A pool that is
        too small gets only the first blocks.
        """
        (pool,) = self.pools
        hashes = hash_blocks(tokens, limit, scope)
        num_missing = sum(not pool.contains(block_hash) for block_hash in hashes)
        if num_missing > pool.num_unused_blocks:
            grow(num_missing - pool.num_unused_blocks)
        block_ids: list[int] = []
        new_blocks: list[tuple[int, int]] = []
        for index, block_hash in enumerate(hashes[: pool.capacity]):
            if pool.contains(block_hash):
                block_ids.append(pool.touch(block_hash))
                continue
            block_ids.append(pool.allocate())
            pool.set_hash(block_ids[-1], block_hash)
            new_blocks.append((index, block_ids[-1]))
        pool.free(block_ids)
        return new_blocks

    def reset_prefix_cache(self) -> None:
        """Drops all cached prefixes; sequences keep the blocks that they reference."""
        for pool in self.pools:
            pool.clear_hashes()

    def check_integrity(self, all_tables: Sequence[BlockTables]) -> None:
        """AssertionError if a block is lost or referenced by others than ``all_tables``."""
        for i, pool in enumerate(self.pools):
            pool.check_integrity([tables[i] for tables in all_tables])
