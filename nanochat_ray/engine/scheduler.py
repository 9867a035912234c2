"""Who runs in the next step, and on how many tokens. No torch: policy only.

Every sequence is a list of tokens of which the first ``computed`` have keys and values. Running a
chunk computes more of them; when a chunk reaches the end of the list, one more token is sampled.
Prefill, decode, a tool's output and recomputation after preemption are all this one thing.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanochat_ray.engine.draft import PromptLookup
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator, BlockTables
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE
from nanochat_ray.engine.request import EngineFull, Request, TokenLogprob
from nanochat_ray.engine.tools import ToolState

if TYPE_CHECKING:
    from nanochat_ray.engine.grammar import GrammarState


CHUNK_PER_DECODE = 3
"""``Scheduler.chunk_per_decode``: at 300 tokens before it a decode made a step 0.55 ms longer, a
token of a prompt 0.15 (``classic``, 14 M weights, one core with AMX, 2026-11-21)."""
DOUBLING_WIDTHS = 2
"""``Scheduler.doubling`` in widths of the model: 24 width² operations of a token and layer against
4 width for each token before it would make 6, but attention is less efficient than products: 1.6
were measured with AMX, and 3.6 without (one core, 2026-11-22)."""


UNKNOWN = -1
"""A token that is only on the device yet."""


@dataclass(eq=False)
class Sequence:
    """A request while the engine has it."""

    request: Request
    tokens: list[int]
    """Prompt and answer so far."""
    seed: int
    limit: int
    """Length of ``tokens`` at which it is cut."""
    tool: ToolState | None = None
    grammar: GrammarState | None = None
    prompts: list[tuple[int, int]] = field(default_factory=list)
    """Stretches ``[start, end)`` of tokens that are run as prompts: the prompt, and what tools
    wrote. All others are run as decodes, also when they are computed anew. Which of the two it is
    must not depend on how chunks fall or on preemption, since they differ in the last bit where
    attention is torch's or a GPU's."""
    lookup: PromptLookup | None = None
    prompt_scores: list[TokenLogprob] | None = None
    """Those of the prompt's tokens from the second on that are known, if they were asked for."""
    computed: int = 0
    slot: int = -1
    late: int = -1
    """While a step is planned and launched before the one ahead of it has told its tokens: the row
    there of this sequence's last token, which is not known yet (``tokens`` ends in UNKNOWN)."""
    order: int = 0
    """Admission goes by it; it survives preemption."""
    ended: bool = False
    ending: frozenset[int] = frozenset()
    cached: int = 0
    """Prompt tokens that were found computed when it was admitted last."""
    blocks: BlockTables = field(default_factory=list)
    """What it holds while it runs, where the layout is paged."""

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of the prompt are still to be found."""
        known = self.prompt_scores
        return known is not None and len(known) < len(self.request.prompt) - 1

    def stretch(self) -> tuple[int, bool]:
        """How far the tokens from ``computed`` on are run alike, and whether as decodes."""
        for start, end in self.prompts:
            if self.computed < end:
                return (start, True) if self.computed < start else (end, False)
        return len(self.tokens), True

    @property
    def decoding(self) -> bool:
        """Whether all that is left to run is one token, as a decode."""
        return self.computed + 1 == len(self.tokens) and self.computed >= self.prompts[-1][1]


def _rank(sequence: Sequence) -> tuple[int, int]:
    """The largest is the first to go."""
    return sequence.request.priority, sequence.order


@dataclass(frozen=True)
class Chunk:
    """Tokens ``[start, start + count)`` of a sequence are to be run in this step."""

    sequence: Sequence
    start: int
    count: int
    decode: bool = False
    """Each token as if it were the only one."""
    draft: tuple[int, ...] = ()
    """Guesses at the tokens behind the sequence's last one, to be run as decodes too."""
    scores: bool = False
    """The logits of every token are wanted."""

    @property
    def samples(self) -> bool:
        """Whether the next token can be sampled after it. No more, perhaps, once more is known
        than when it was planned."""
        s = self.sequence
        return not s.ended and self.start + self.count == len(s.tokens)

    @property
    def rows(self) -> int:
        """Of how many of its last tokens, guesses included, logits are wanted."""
        return self.count if self.scores else (1 + len(self.draft)) * self.samples


@dataclass
class Scheduler:
    """Slots and queues.

    Invariants: a sequence is either waiting (no slot) or running (a slot of its own); decodes are
    in every plan, except where the last token is being made; a plan never exceeds
    ``max_num_batched_tokens``, nor, while anything decodes, the larger of ``prefill_chunk`` for
    each prompt and ``chunk_per_decode`` for each decode in prompt tokens.

    With ``blocks``, which hold at least one sequence as long as may be, a sequence is admitted
    when there are blocks for all its tokens. When they run out, it takes them from those behind
    it (lower priority, or later); the last of all stands still meanwhile. So the first one always
    gets on, and there is no deadlock.
    """

    slots: int
    max_num_batched_tokens: int
    prefill_chunk: int
    max_queue_size: int
    doubling: int = 0
    """Tokens before it at which a prompt's token takes twice as long as the first one, since it
    attends to all of them; 0 if that does not count."""
    chunk_per_decode: int = 0
    """A step of many decodes takes longer anyway, and those who wait for it are delayed less by a
    larger share of a prompt."""
    draft_tokens: int = 0
    """Guesses that a sequence may run in one step."""
    draft_rows: int = 0
    """Rows of a step, decodes included, up to which there are guesses; 0 is no bound."""
    blocks: BlockAllocator | None = None
    """Where the layout is paged: what sequences hold keys and values in."""
    on_blocks: Callable[[Sequence], None] = lambda sequence: None
    """Called when a sequence has got more blocks."""
    on_draft: Callable[[Sequence, int], SequenceOf[int]] = lambda sequence, most: ()
    """Guesses at what follows a sequence's tokens, at most so many."""
    on_admit: Callable[[Sequence], None] = lambda sequence: None
    """Called when a sequence has got its slot."""
    on_begin: Callable[[Sequence], None] | None = None
    """Called before a sequence's first chunk; sets ``computed`` to what is known of it already,
    from others' prompts up to the last step."""
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    _free: list[int] = field(default_factory=list)
    _orders: int = 0
    _turns: dict[str, int] = field(default_factory=dict)
    """When each client's turn was last; forgotten once nobody waits."""

    def __post_init__(self) -> None:
        self._free = list(range(self.slots))

    @property
    def room(self) -> int:
        """Requests that may still come."""
        return self.max_queue_size + len(self._free) - len(self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Raises EngineFull when as many wait as may."""
        if self.room <= 0:
            raise EngineFull(f"max_queue_size={self.max_queue_size} requests are waiting already")
        sequence.order = self._orders
        self._orders += 1
        self.waiting.append(sequence)

    def plan(self) -> list[Chunk]:
        """Admits whom there is room for; chunks of the next step, decodes first, by slot."""
        self._admit()
        steady: list[Sequence] = []
        others: list[Sequence] = []
        for s in self.running:
            if s.late < 0 or len(s.tokens) < s.limit:  # else its last token is being made
                (steady if s.decoding else others).append(s)
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens - len(steady)
        rest = float(min(budget, self._chunk(len(steady), len(others))))
        for s in others:
            if rest < 1:
                break
            if s.slot < 0:
                continue  # its blocks have just gone to one before it
            if s.computed == 0 and self.on_begin is not None:
                if any(self._computes(c, s) for c in chunks):
                    continue
                self.on_begin(s)
            end, decode = s.stretch()
            # Late in a long prompt a token takes longer, and those who decode wait for it.
            price = 1 + s.computed / self.doubling if steady and self.doubling else 1.0
            count = min(end - s.computed, max(1, int(rest / price)))
            if self.blocks is not None and not self._hold(s, s.computed + count):
                continue
            scores = s.unscored and not decode
            chunks.append(Chunk(s, s.computed, count, decode, scores=scores))
            rest -= count * price
            budget -= count
        if self.draft_rows:
            budget = min(budget, self.draft_rows - len(steady))
        for s in steady:
            if self.blocks is not None and not self._hold(s, s.computed + 1):
                continue
            # What is sampled behind the last guess still has to fit.
            most = min(self.draft_tokens, budget, s.limit - len(s.tokens) - 1)
            draft = tuple(self.on_draft(s, most)) if most > 0 else ()
            if draft and not self._grow(s, s.computed + 1 + len(draft)):
                draft = ()  # nobody is put off for a guess
            chunks.append(Chunk(s, s.computed, 1, True, draft))
            budget -= len(draft)
        if self.blocks is not None:
            chunks = [c for c in chunks if c.sequence.slot >= 0]
        # Stable: prompts stay in the order of admission.
        chunks.sort(key=lambda c: (not c.decode, c.sequence.slot if c.decode else 0))
        return chunks

    def may_guess(self, decodes: int) -> bool:
        """Whether a step of so many decodes has rows left for guesses."""
        return self.draft_tokens > 0 and (not self.draft_rows or decodes < self.draft_rows)

    def _chunk(self, decodes: int, prompts: int) -> int:
        """Prompt tokens of a step: it takes longer, the more wait for their first token."""
        if not decodes:
            return self.max_num_batched_tokens
        return max(self.prefill_chunk * prompts, self.chunk_per_decode * decodes)

    def _grow(self, sequence: Sequence, end: int) -> bool:
        """Whether it has blocks up to token ``end``, new ones from what is free if need be."""
        if self.blocks is None:
            return True
        before = len(sequence.blocks[0])
        if not self.blocks.extend(sequence.blocks, sequence.computed, end):
            return False
        if len(sequence.blocks[0]) > before:
            self.on_blocks(sequence)
        return True

    def _hold(self, sequence: Sequence, end: int) -> bool:
        """Whether it runs and has blocks up to token ``end``, from those behind it if need be."""
        if sequence.slot < 0:
            return False
        while not self._grow(sequence, end):
            last = max((s for s in self.running if any(s.blocks)), key=_rank)
            if _rank(last) <= _rank(sequence):
                return False
            self.preempt(last)
        return True

    @staticmethod
    def _computes(chunk: Chunk, sequence: Sequence) -> bool:
        """Whether the chunk computes a block of the sequence's prompt, which may then wait for it
        instead of computing it too."""
        end = chunk.start // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE
        if sequence.unscored or end > min(chunk.start + chunk.count, len(sequence.request.prompt)):
            return False
        other = chunk.sequence
        alike = other.request.cache_scope == sequence.request.cache_scope
        return alike and other.tokens[:end] == sequence.tokens[:end]

    def expire(self, now: float) -> list[Sequence]:
        """Forgets those whose deadline is at ``now`` or before, and returns them."""
        late = [
            s
            for s in (*self.running, *self.waiting)
            if s.request.deadline is not None and s.request.deadline <= now
        ]
        for s in late:
            self.remove(s)
        return late

    def _admit(self) -> None:
        if not self.waiting:
            self._turns.clear()
        while self.waiting:
            shares = Counter(s.request.client for s in self.running)
            # Within a priority the client that runs least goes first, among several the one whose
            # turn is longest ago, and of its requests the first.
            first = min(
                self.waiting,
                key=lambda s: (
                    s.request.priority,
                    shares[s.request.client],
                    self._turns.get(s.request.client, -1),
                    s.order,
                ),
            )
            if first.late >= 0:
                break  # it has just been put off, and its last token is not known yet
            if not self._free or not self._has_room(first):
                last = max(self.running, key=_rank)
                if last.request.priority <= first.request.priority:
                    break
                self.preempt(last)
                continue
            self.waiting.remove(first)
            self._turns[first.request.client] = max(self._turns.values(), default=-1) + 1
            first.slot = heapq.heappop(self._free)
            if self.blocks is not None:
                first.blocks = self.blocks.empty_tables()
            self.running.append(first)
            self.on_admit(first)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether there are blocks for its tokens and one more, beside those who run."""
        if self.blocks is None:
            return True
        length = min(len(sequence.tokens) + 1, sequence.limit)
        return self.blocks.can_admit(length, [(s.blocks, len(s.tokens)) for s in self.running])

    def preempt(self, sequence: Sequence) -> None:
        """Takes its slot; it waits again and its tokens are recomputed, with the same outcome."""
        self._release(sequence)
        sequence.computed = 0
        self.preemptions += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is."""
        sequence.ended = True
        if sequence.slot >= 0:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        heapq.heappush(self._free, sequence.slot)
        sequence.slot = -1
        if self.blocks is not None:
            self.blocks.free(sequence.blocks)
            sequence.blocks = []

    def check_integrity(self) -> None:
        """Every slot is free or has one running sequence, and so is every block. AssertionError if
        not."""
        used = [s.slot for s in self.running]
        assert sorted(used + self._free) == list(range(self.slots)), (used, self._free)
        assert all(s.slot == -1 and s.computed == 0 for s in self.waiting)
        assert not set(map(id, self.running)) & set(map(id, self.waiting))
        assert not any(s.blocks for s in self.waiting)
        if self.blocks is not None:
            self.blocks.check_integrity([s.blocks for s in self.running])
