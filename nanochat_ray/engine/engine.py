"""The engine: requests join and leave the running batch at every step.

The way of one request:

1. ``add`` checks it (``validate``), draws a seed if it has none, and queues a
   ``scheduler.Sequence``: its tokens, and how many of them have keys and values.
2. Each ``step`` ends what is past its deadline and asks the ``scheduler`` for a plan. That admits
   whoever there is a slot for (priority, then the client that runs least, then who came first);
   the slot's row of ``sampling_state`` is filled. The plan is a list of chunks: one token for each
   decode, with guesses from ``draft`` behind it, then prompts under the token budget; before a
   prompt's first chunk ``prefixes`` gives it what ``blocks`` knows of its beginning, and one whose
   beginning another computes just now waits a step for it.
3. The ``runner`` runs all chunks as rows of one forward; ``kv_cache`` (on a CPU: a slot for each
   sequence) or ``paged_cache`` (on a GPU: ``blocks``) keeps their keys and values and attends.
   Back come logits for the rows that want some.
4. ``sampling_state`` bends them (bias, penalties, bans, ``grammar``), ``sampler`` chooses tokens: a
   pure function of (logits, parameters, seed, position); ``scores`` finds log-probabilities.
   The step is ``launched``.
5. ``_extend`` decides what a token means: guesses hold up to the first wrong one; a token may end
   the answer or, through ``tools``, force others. What is new leaves as an ``Output``.

On a GPU steps overlap: while one runs, the next is planned and launched, with tokens that only the
GPU knows. What turns out to have ended by then, or to go on as a tool wants, ran in vain.

Who is preempted waits with its tokens, which are then computed as they were the first time.
Not thread-safe: ``loop.EngineLoop`` is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.draft import PromptLookup
from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.engine.kvcache.prefixes import CopiedPrefixes
from nanochat_ray.engine.launched import Launched, Ran, launch
from nanochat_ray.engine.request import Finish, Output, Request, TokenLogprob
from nanochat_ray.engine.runner import Runner
from nanochat_ray.engine.sampling_state import SamplingState
from nanochat_ray.engine.scheduler import (
    CHUNK_PER_DECODE,
    DOUBLING_WIDTHS,
    Chunk,
    Scheduler,
    Sequence,
)
from nanochat_ray.engine.scores import PromptScores
from nanochat_ray.engine.stats import Stats
from nanochat_ray.engine.tools import Tool, ToolState
from nanochat_ray.model.gpt import GPT

logger = logging.getLogger(__name__)


class Engine:
    """Answers requests over one model, which it takes over (dtype and memory layout may change).

    Equal requests with equal seeds get equal tokens, whatever runs beside them, however prompts
    are cut into chunks, and after preemption or a move to another engine.
    """

    def __init__(
        self,
        model: GPT,
        config: EngineConfig,
        tool: Tool | None = None,
        token_bytes: SequenceOf[bytes] | None = None,
    ):
        """``token_bytes[t]`` is token t's text (empty: none); without, grammars are refused."""
        self.config, self.tool = config, tool
        self.max_model_len = config.max_model_len or model.config.sequence_len
        self.vocab_size = model.config.vocab_size
        self.runner = Runner(model, config, self.max_model_len)
        self._prefixes = self.runner.prefixes(config.prefix_cache_tokens)
        self._sampling = SamplingState(config.max_num_seqs, self.vocab_size, self.runner.device)
        self.scheduler = Scheduler(
            slots=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefill_chunk=config.prefill_chunk,
            max_queue_size=config.max_queue_size,
            chunk_per_decode=CHUNK_PER_DECODE,
            doubling=DOUBLING_WIDTHS * model.config.n_embd,
            draft_tokens=config.num_speculative_tokens,
            draft_rows=config.speculative_disable_by_batch_size,
            on_draft=self._draft,
            on_admit=self._sampling.admit,
            on_begin=None if self._prefixes is None else self._prefixes.begin,
            blocks=self.runner.blocks,
            on_blocks=self.runner.assign,
        )
        self._grammars = Grammars(token_bytes, self.vocab_size) if token_bytes else None
        self._async_scheduling = config.async_scheduling == "on" or (
            config.async_scheduling == "auto" and self.runner.device.type == "cuda"
        )
        self._flying: Launched | None = None
        """The last step, where it may still run."""
        self._sequences: dict[str, Sequence] = {}
        self._ready: list[Output] = []
        self._stats = Stats(slots=config.max_num_seqs, kernels=self.runner.kernels)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._ready)

    def validate(self, request: Request) -> None:
        """ValueError if this engine can never answer it. Any thread may call it."""
        tokens = (*request.prompt, *request.generated)
        if not request.prompt:
            raise ValueError("prompt: it must hold at least one token")
        if len(tokens) + min(1, request.params.max_tokens) > self.max_model_len:
            raise ValueError(
                f"prompt has {len(tokens)} tokens, but the context holds {self.max_model_len} "
                "together with at least one token of the answer"
            )
        for name, ids in (
            ("prompt", tokens),
            ("logit_bias", tuple(request.params.logit_bias)),
            ("stop_ids", request.params.stop_ids),
            ("eos_ids", request.params.eos_ids),
        ):
            wrong = next((t for t in ids if not 0 <= t < self.vocab_size), None)
            if wrong is not None:
                allowed = f"token ids from 0 to {self.vocab_size - 1}"
                raise ValueError(f"{name}={wrong} is not allowed: {allowed}")
        if request.params.grammar is not None:
            if self._grammars is None:
                raise ValueError("grammar: this engine does not know the text of its tokens")
            self._grammars.check(request.params.grammar)

    def prepare(self, request: Request) -> Future[Any] | None:
        """What ``validate`` and ``add`` would wait for: its grammar is compiled. None without."""
        grammar = request.params.grammar
        return self._grammars.compile(grammar) if self._grammars and grammar else None

    def add(self, request: Request) -> None:
        """Raises ValueError (see ``validate``; or its id is in use) or EngineFull."""
        self.validate(request)
        if request.id in self._sequences:
            raise ValueError(f"id={request.id!r} is in use by another request")
        request = request.seeded()
        params, grammar = request.params, None
        if self._grammars is not None and params.grammar is not None:
            limit = min(params.max_tokens, self.max_model_len - len(request.prompt))
            grammar = self._grammars.start(params.grammar, params.ending, request.generated, limit)
        sequence = Sequence(
            request=request,
            tokens=[*request.prompt, *request.generated],
            seed=params.seed or 0,
            limit=min(self.max_model_len, len(request.prompt) + params.max_tokens),
            # What a tool writes would not follow the grammar.
            tool=ToolState(self.tool) if self.tool and grammar is None else None,
            grammar=grammar,
            ending=params.ending,
            prompts=[(0, len(request.prompt))],
            # Whoever made a part of the answer has told them.
            prompt_scores=None if params.prompt_logprobs is None or request.generated else [],
        )
        if self.config.num_speculative_tokens:
            sequence.lookup = PromptLookup(self.config.prompt_lookup_max)
        due: list[int] = []
        if sequence.tool is not None:
            due, written = sequence.tool.replay(request.generated)
            first = len(request.prompt)
            sequence.prompts += [(first + start, first + end) for start, end in written]
        finish = self._finish(sequence, request.generated[-1]) if request.generated else None
        complete = finish is None and sequence.grammar is not None and sequence.grammar.finished
        finish = "stop" if complete else finish
        if finish is not None:
            due = []
        elif due:
            # The engine before this one was lost while it wrote a tool's output.
            due = due[: sequence.limit - len(sequence.tokens)]
            sequence.tokens += due
            finish = "length" if len(sequence.tokens) >= sequence.limit else None
        if finish is None:
            self.scheduler.add(sequence)
            self._sequences[request.id] = sequence
        if finish or due:
            self._ready.append(
                Output(
                    request_id=request.id,
                    tokens=due,
                    forced=list(range(len(due))),
                    finish=finish,
                    complete=complete,
                )
            )

    def abort(self, request_id: str) -> bool:
        """Frees what the request holds, at once; False if there is no such request."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self.scheduler.remove(sequence)
        self._ready = [o for o in self._ready if o.request_id != request_id]
        self._ready.append(Output(request_id=request_id, finish="abort"))
        return True

    def preempt(self, request_id: str) -> None:
        """Makes a running request give its slot back and wait; its tokens will be the same."""
        sequence = self._sequences[request_id]
        if sequence.slot >= 0:
            self.scheduler.preempt(sequence)

    def reset(self) -> list[str]:
        """Forgets every request; returns their ids."""
        lost, self._flying = list(self._sequences), None
        for sequence in self._sequences.values():
            self.scheduler.remove(sequence)
        self._sequences.clear()
        self._ready.clear()
        return lost

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """One forward of the batch. At most two outputs for each request that got tokens or ended,
        the earlier one first.

        Where steps overlap, outputs are of the step before, which was still running, and of this
        one only if the next cannot be launched without knowing them.
        """
        began, flying = time.perf_counter(), self._flying
        outputs, self._ready = self._ready, []
        if flying is None:
            outputs += self._expire(time.time())
        flown = flying.assume() if flying is not None else None
        try:
            chunks = self.scheduler.plan()
            ran = self._run(chunks, flown) if chunks else None
            launched: Launched | None = None
            if ran is not None and not ran.waits:
                launched = launch(ran, self._sampling, self._grammars, flown)
        finally:
            if flying is not None:
                flying.forget()
        self._flying = None
        if flying is not None:
            outputs += self._land(flying)
            outputs += self._expire(time.time())
        if ran is not None and ran.waits:
            launched = launch(ran, self._sampling, self._grammars)
        if launched is not None:
            guesses = self.scheduler.may_guess(len(launched.chunks))
            if self._async_scheduling and launched.leads and not guesses:
                self._flying = launched
            else:
                outputs += self._land(launched)
        if chunks or flying:
            self._stats.steps += bool(chunks)
            self._stats.step_seconds += time.perf_counter() - began
        return outputs

    def _expire(self, now: float) -> list[Output]:
        outputs = []
        for s in self.scheduler.expire(now):
            del self._sequences[s.request.id]
            made, late = len(s.tokens) - len(s.request.prompt), now - (s.request.deadline or now)
            why = f"deadline: it passed {late:.3f} s ago, with {made} tokens of the answer made"
            outputs.append(Output(request_id=s.request.id, finish="error", error=why))
        return outputs

    @staticmethod
    def _draft(sequence: Sequence, most: int) -> list[int]:
        if sequence.lookup is None:
            return []
        draft = sequence.lookup.propose(sequence.tokens, most)
        return draft[: sequence.grammar.agreed(draft)] if draft and sequence.grammar else draft

    def _run(self, chunks: list[Chunk], flown: Tensor | None) -> Ran:
        logits = self.runner.run(chunks, flown)
        scored = PromptScores(chunks, logits) if any(c.scores for c in chunks) else None
        sampling: list[tuple[int, Chunk]] = []
        row = 0
        for chunk in chunks:
            s, count = chunk.sequence, chunk.rows
            s.computed = chunk.start + chunk.count
            row += count
            if not chunk.decode:
                self._stats.prompt_tokens += chunk.count
                if self._prefixes is not None and chunk.start < len(s.request.prompt):
                    self._prefixes.keep(s)
            if count and chunk.samples:
                sampling.append((row - 1 - len(chunk.draft), chunk))
        return Ran(logits, sampling, scored)

    def _land(self, launched: Launched) -> list[Output]:
        """Takes the tokens that were chosen, as far as they hold."""
        chosen, scores = launched.results()
        outputs: list[Output] = []
        pairs: list[tuple[int, int]] = []
        at = 0
        for chunk in launched.chunks:
            here, slot = slice(at, at + 1 + len(chunk.draft)), chunk.sequence.slot
            at = here.stop
            if not chunk.samples:
                continue  # it ended, or a tool wrote, after this had been launched
            try:
                outputs.append(self._extend(chunk, chosen[here], scores[here]))
            except Exception as error:  # of a tool, say: the others of the step have their tokens
                logger.exception("request %s failed", chunk.sequence.request.id)
                outputs.append(self._give_up(chunk.sequence, f"{type(error).__name__}: {error}"))
                continue
            self._stats.generated_tokens += len(outputs[-1].tokens)
            if slot >= 0:  # who was put off meanwhile is counted anew
                pairs += [(slot, token) for token in outputs[-1].tokens]
        self._sampling.count([slot for slot, _ in pairs], [token for _, token in pairs])
        return outputs

    def _extend(self, chunk: Chunk, chosen: list[int], scores: list[TokenLogprob | None]) -> Output:
        """Takes the tokens chosen after a chunk, up to the first that was guessed wrong."""
        s = chunk.sequence
        asked = s.request.params.logprobs is not None
        first = len(s.tokens) == len(s.request.prompt)
        made: list[int] = []
        forced: list[int] = []
        complete, error = False, None
        finish: Finish | None = "length" if len(s.tokens) >= s.limit else None
        while finish is None:
            i = len(made)
            token = chosen[i]
            if not 0 <= token < self.vocab_size:
                error, finish = self._no_token(s), "error"
                break
            s.tokens.append(token)
            made.append(token)
            finish = self._finish(s, token)
            if finish != "stop" and s.grammar is not None:
                s.grammar.feed([token])
                if (reason := s.grammar.error) is not None:
                    error, finish = reason, "error"
                elif complete := s.grammar.finished:
                    finish = "stop"
            if finish is None and s.tool is not None:
                forced = s.tool.feed(token)[: s.limit - len(s.tokens)]
                if forced:
                    s.computed = min(s.computed, len(s.tokens) - 1)
                    s.prompts.append((len(s.tokens) - 1, len(s.tokens) + len(forced)))
                    s.tokens += forced
                    finish = "length" if len(s.tokens) >= s.limit else None
                    break
            if i == len(chunk.draft) or chunk.draft[i] != token:
                break
            s.computed += 1
        self._stats.drafted += len(chunk.draft)
        self._stats.draft_accepted += max(0, len(made) - 1)
        if finish is not None:
            self.scheduler.remove(s)
            del self._sequences[s.request.id]
            self._stats.finished += 1
        return Output(
            request_id=s.request.id,
            tokens=made + forced,
            forced=list(range(len(made), len(made) + len(forced))),
            finish=finish,
            error=error,
            complete=complete,
            cached_tokens=s.cached if first else 0,
            logprobs=[*scores[: len(made)], *[None] * len(forced)] if asked else None,
            prompt_logprobs=s.prompt_scores if first and error is None else None,
        )

    def _give_up(self, sequence: Sequence, reason: str) -> Output:
        """Ends a request that failed, and no other."""
        if not sequence.ended:
            self.scheduler.remove(sequence)
        self._sequences.pop(sequence.request.id, None)
        self._stats.finished += 1
        return Output(request_id=sequence.request.id, finish="error", error=reason)

    @staticmethod
    def _no_token(sequence: Sequence) -> str:
        """Why a row has no token: the others of its step have theirs."""
        if sequence.grammar is not None and sequence.grammar.error is not None:
            return sequence.grammar.error
        return f"logits: they are not finite at position {len(sequence.tokens)}"

    @staticmethod
    def _finish(sequence: Sequence, token: int) -> Finish | None:
        if token in sequence.ending:
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.limit else None

    def stats(self) -> Stats:
        stats, scheduler = self._stats, self.scheduler
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        if scheduler.blocks is None:
            held = sum(s.computed for s in scheduler.running)
            stats.kv_used = held / (self.config.max_num_seqs * self.max_model_len)
        else:
            stats.kv_used = scheduler.blocks.usage
        stats.preemptions = scheduler.preemptions
        if self._prefixes is not None:
            known = self._prefixes.blocks
            stats.prefix_queried, stats.prefix_hit = known.num_lookup_tokens, known.num_hit_tokens
        return stats

    def check_integrity(self) -> None:
        """AssertionError if a slot, a block or a request has leaked. Cheap; meant for when idle."""
        self.scheduler.check_integrity()
        if isinstance(self._prefixes, CopiedPrefixes):
            self._prefixes.blocks.check_integrity([])
        known = {*self.scheduler.running, *self.scheduler.waiting}
        assert known == set(self._sequences.values()), "a sequence is queued but unknown, or lost"
        coming = self._flying is not None
        for sequence in self.scheduler.running:
            assert 0 <= sequence.computed < len(sequence.tokens) + coming
            assert len(sequence.tokens) <= sequence.limit
            assert sequence.late < 0
