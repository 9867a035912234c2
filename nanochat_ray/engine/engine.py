"""The engine: requests join and leave the running batch at every step.

``README.md`` describes the life of a request. Not thread-safe; ``loop.EngineLoop`` is.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from typing import Any, Self

import torch
from torch import Tensor

from nanochat_ray.engine.acceptance import accept_tokens, append_token
from nanochat_ray.engine.admission import Admitter
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.engine.in_flight import ForwardOutput, InFlightStep, sample
from nanochat_ray.engine.prefill_cost import PrefillCostModel
from nanochat_ray.engine.queue_time import QueueTime
from nanochat_ray.engine.request import Request, RequestOutput, TokenLogprob
from nanochat_ray.engine.runner import Runner
from nanochat_ray.engine.sampling_state import SamplingState
from nanochat_ray.engine.scheduler import ScheduledChunk, Scheduler
from nanochat_ray.engine.sequence import Sequence
from nanochat_ray.engine.stats import Stats
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tools import Tool, calculator_tool

logger = logging.getLogger(__name__)


class Engine:
    """Generates the outputs of requests with one model, whose weights it copies.

    Equal requests with equal seeds get equal tokens, whatever runs beside them, however prompts
    are split into chunks, and after preemption or a move to another engine.
    """

    def __init__(
        self,
        model: GPT,
        config: EngineConfig,
        tool: Tool | None = None,
        token_bytes: SequenceOf[bytes] | None = None,
        device: torch.device | str | None = None,
    ):
        """``token_bytes[t]`` is the text of token t (empty: none). Without it, requests with a
        grammar are rejected.

        The engine copies the weights to ``device``, by default the model's, and does not change the
        model.
        """
        self.config = config
        self.weight_version = ""
        """Names the weights (``checkpoint.weight_version``); reported with each output."""
        self.max_model_len = config.max_model_len or model.config.sequence_len
        self.vocab_size = model.config.vocab_size
        self.runner = Runner(model, config, self.max_model_len, device)
        self._sampling = SamplingState(
            config.max_num_seqs, self.vocab_size, self.runner.device, self.runner.native
        )
        if self.runner.graphs is not None:
            self.runner.graphs.record(self._sampling.plain_sampler)
        self.scheduler = Scheduler(
            kv_cache=self.runner.kv_manager,
            num_slots=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefill_chunk=config.prefill_chunk,
            max_queue_size=config.max_queue_size,
            prefill_cost=PrefillCostModel.of_width(model.config.n_embd),
            num_speculative_tokens=config.num_speculative_tokens,
            speculative_disable_by_batch_size=config.speculative_disable_by_batch_size,
        )
        self.queue_time = QueueTime(config.max_num_seqs)
        self._grammars = Grammars(token_bytes, self.vocab_size) if token_bytes else None
        self._admitter = Admitter(config, self.max_model_len, self.vocab_size, tool, self._grammars)
        self.num_step_tokens = 0
        """Tokens that the current step computes, or that the last one did."""
        self._async_scheduling = config.async_scheduling == "on" or (
            config.async_scheduling == "auto" and self.runner.device.type == "cuda"
        )
        self._in_flight: InFlightStep | None = None
        """The last step, if its tokens are not committed yet."""
        self._sequences: dict[str, Sequence] = {}
        self._ready: list[RequestOutput] = []
        """Outputs that the next ``step`` returns."""
        self._stats = Stats(slots=config.max_num_seqs, kernels=self.runner.kernels)

    @classmethod
    def from_model(
        cls,
        model: GPT,
        tokenizer: Tokenizer,
        config: EngineConfig,
        device: torch.device | str | None = None,
    ) -> Self:
        """An engine with the calculator and with grammars."""
        return cls(model, config, calculator_tool(tokenizer), tokenizer.byte_table(), device)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._ready)

    def validate(self, request: Request) -> None:
        """ValueError if this engine can never process the request. Any thread may call it."""
        self._admitter.validate(request)

    def prepare(self, request: Request) -> Future[Any] | None:
        """What ``validate`` and ``add`` would wait for: its grammar is compiled. None without."""
        return self._admitter.prepare(request)

    def add(self, request: Request) -> None:
        """Raises ValueError (see ``validate``; or its id is in use) or EngineFull."""
        self.validate(request)
        if request.id in self._sequences:
            raise ValueError(f"id={request.id!r} is in use by another request")
        admission = self._admitter.admit(request.with_seed())
        if admission.finish is None:
            self.scheduler.add(admission.sequence)
            self._sequences[request.id] = admission.sequence
        if admission.finish or admission.tool_tokens:
            self._ready.append(
                RequestOutput(
                    request_id=request.id,
                    tokens=admission.tool_tokens,
                    tool_token_indices=list(range(len(admission.tool_tokens))),
                    finish=admission.finish,
                    complete=admission.completes_grammar,
                    weight_version=self.weight_version,
                )
            )

    def abort(self, request_id: str) -> bool:
        """Releases what the request has, at once; False if there is no such request."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self.scheduler.remove(sequence)
        self._ready = [o for o in self._ready if o.request_id != request_id]
        self._ready.append(RequestOutput(request_id=request_id, finish="abort"))
        return True

    def preempt(self, request_id: str) -> None:
        """Makes a running request wait without its slot; its tokens will be the same."""
        sequence = self._sequences[request_id]
        if sequence.slot >= 0:
            self.scheduler.preempt(sequence)

    def load_weights(self, weights: Mapping[str, Tensor], version: str = "") -> None:
        """Replaces the model's weights in place, between two steps, by a state dict of the model.
        ``version`` is the new ``weight_version``.

        Later answers and log-probabilities equal those of a new engine with these weights: cached
        prefixes are dropped, and running requests are preempted, so that the keys and values of
        their tokens are recomputed. ValueError names a tensor with a wrong name, shape or dtype;
        then nothing has changed.
        """
        for _ in self.load_steps(weights, version):
            pass

    def load_steps(self, weights: Mapping[str, Tensor], version: str = "") -> Iterator[None]:
        """``load_weights``, a tensor at a time, for a caller with other work between them. The
        engine must not step before the end: until then the weights are mixed."""
        self.check_weights(weights)
        self._settle()
        for sequence in list(self.scheduler.running):
            self.scheduler.preempt(sequence)
        self.runner.kv_manager.reset_prefix_cache()
        yield from self.runner.model.load_steps(weights)
        self.weight_version = version

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """ValueError that names a tensor if ``load_weights`` cannot take these."""
        self.runner.model.check_weights(weights)

    def _settle(self) -> None:
        """Commits the step that is in flight."""
        if self._in_flight is not None:
            step, self._in_flight = self._in_flight, None
            self._ready += self._commit(step)

    def withdraw_waiting(self) -> list[Request]:
        """Removes and returns the requests that wait and have no output, in order of arrival.

        They may begin on other weights; those with a ``weight_version`` may not, and stay.
        """
        return self.withdraw([s for s in self.scheduler.waiting if not s.request.weight_version])

    def withdraw(self, sequences: SequenceOf[Sequence]) -> list[Request]:
        """Removes those of ``sequences`` that have no output; returns them in order of arrival."""
        without_output = [s for s in sequences if len(s.tokens) == len(s.request.prompt)]
        for s in without_output:
            self.scheduler.remove(s)
            del self._sequences[s.request.id]
        return [s.request for s in sorted(without_output, key=lambda s: s.arrival)]

    def interrupt(self, reason: str) -> tuple[list[Request], list[RequestOutput]]:
        """Removes every request. Returns those that may begin again (``withdraw_waiting``), running
        ones included, and the last outputs of the others, which end with the error ``reason``."""
        self._settle()
        requests = self.withdraw(
            [s for s in self._sequences.values() if not s.request.weight_version]
        )
        outputs, self._ready = self._ready, []
        outputs += [self._fail(s, reason) for s in list(self._sequences.values())]
        return requests, outputs

    def reset(self) -> list[str]:
        """Removes every request; returns their ids."""
        request_ids, self._in_flight = list(self._sequences), None
        for sequence in self._sequences.values():
            self.scheduler.remove(sequence)
        self._sequences.clear()
        self._ready.clear()
        return request_ids

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """One forward of the batch. At most two outputs for each request that got tokens or
        finished, the earlier one first.

        With asynchronous scheduling the outputs are those of the previous step, which was still in
        flight, and of this one only if the next cannot be planned without its tokens.
        """
        start, previous = time.perf_counter(), self._in_flight
        outputs, self._ready = self._ready, []
        if previous is None:
            outputs += self._expire(time.monotonic())
        plan = self.scheduler.plan()
        self.num_step_tokens = sum(chunk.num_tokens for chunk in plan.chunks)
        for sequence in plan.admissions:
            self._sampling.admit(sequence)
        if not plan.chunks and previous is None and self.scheduler.running:
            outputs.append(self._fail_for_memory())
        previous_ids = previous.input_ids() if previous is not None else None
        forward = self._run(plan.chunks, previous_ids) if plan.chunks else None
        step: InFlightStep | None = None
        if forward is not None and not forward.needs_previous_tokens:
            step = sample(forward, self._sampling, self._grammars, previous_ids)
        if previous is not None:
            self._in_flight = None
            outputs += self._commit(previous)
            outputs += self._expire(time.monotonic())
        if forward is not None and forward.needs_previous_tokens:
            step = sample(forward, self._sampling, self._grammars)
        if step is not None:
            if self._may_stay_in_flight(step):
                step.add_placeholders()
                self._in_flight = step
            else:
                outputs += self._commit(step)
        if plan.chunks or previous:
            self._stats.steps += bool(plan.chunks)
            seconds = time.perf_counter() - start
            self._stats.step_seconds += seconds
            if plan.chunks:
                prompt_chunks = [c.num_tokens for c in plan.chunks if not c.is_decode]
                self.queue_time.record_step(seconds, len(plan.chunks), prompt_chunks)
        return outputs

    def _fail_for_memory(self) -> RequestOutput:
        """Nothing can run, since not even the first sequence gets memory: ends it."""
        first = min(self.scheduler.running, key=lambda s: (s.request.priority, s.arrival))
        why = f"memory: the machine has none left for keys and values of {first.num_tokens} tokens"
        logger.error("request %s: %s", first.request.id, why)
        return self._fail(first, why)

    def _expire(self, now: float) -> list[RequestOutput]:
        outputs = []
        for s in self.scheduler.expire(now):
            del self._sequences[s.request.id]
            count = len(s.tokens) - len(s.request.prompt)
            delay = now - (s.request.deadline or now)
            why = f"deadline: it passed {delay:.3f} s ago, with {count} tokens generated"
            outputs.append(RequestOutput(request_id=s.request.id, finish="error", error=why))
        return outputs

    def _run(self, chunks: list[ScheduledChunk], previous_ids: Tensor | None) -> ForwardOutput:
        result = self.runner.run(chunks, previous_ids)
        for chunk in chunks:
            s = chunk.sequence
            s.num_computed_tokens = chunk.end
            if not chunk.is_decode:
                self._stats.prompt_tokens += chunk.num_tokens
                if chunk.start < len(s.request.prompt):
                    self.runner.kv_manager.commit(s)
        return ForwardOutput.of(chunks, result)

    def _may_stay_in_flight(self, step: InFlightStep) -> bool:
        """Whether the next step is planned before the tokens of this one are known: every sequence
        gets exactly one token, and no draft is expected.

        Draft tokens depend on the latest token. Where the tokens before it have a draft, a text
        repeats itself, so that the next step waits to have one too."""
        if not self._async_scheduling or step.has_draft:
            return False
        can_speculate = self.scheduler.can_speculate(len(step.chunks))
        return not (can_speculate and any(c.sequence.propose_draft(1) for c in step.chunks))

    def _commit(self, step: InFlightStep) -> list[RequestOutput]:
        """Appends the tokens of a step to the sequences that still need them."""
        token_ids, logprobs = step.wait()
        outputs: list[RequestOutput] = []
        slots: list[int] = []
        """Of the outputs."""
        end = 0
        for chunk in step.chunks:
            s, first = chunk.sequence, end
            end, slot = first + 1 + len(chunk.draft), s.slot
            s.num_placeholders = 0
            if not s.needs_token_at(chunk.end):
                continue  # it finished, or a tool call ended, after this step had been planned
            try:
                output = self._extend(chunk, token_ids[first:end], logprobs[first:end])
            except Exception as error:  # of a tool, for example: it concerns this request alone
                logger.exception("request %s failed", s.request.id)
                output = self._fail(s, f"{type(error).__name__}: {error}")
            outputs.append(output)
            slots.append(slot)
        self._stats.generated_tokens += sum([len(output.tokens) for output in outputs])
        if self._sampling.counts_tokens:
            # A preempted sequence is counted when it is admitted again.
            pairs = zip(slots, outputs, strict=True)
            new_tokens = [(slot, t) for slot, output in pairs if slot >= 0 for t in output.tokens]
            self._sampling.count([s for s, _ in new_tokens], [t for _, t in new_tokens])
        return outputs

    def _extend(
        self, chunk: ScheduledChunk, sampled_ids: list[int], logprobs: list[TokenLogprob | None]
    ) -> RequestOutput:
        """Appends the tokens sampled behind a chunk, and finishes the sequence if it is done."""
        s = chunk.sequence
        is_first = len(s.tokens) == len(s.request.prompt)
        if not is_first and append_token(s, sampled_ids, self.vocab_size):
            # Nothing but one more token: so it is with nearly all outputs.
            has_logprobs = s.request.params.logprobs is not None
            return RequestOutput(
                request_id=s.request.id,
                tokens=sampled_ids,
                logprobs=logprobs[:1] if has_logprobs else None,
            )
        result = accept_tokens(s, chunk.draft, sampled_ids, self.vocab_size)
        if chunk.draft:
            self._stats.num_draft_tokens += len(chunk.draft)
            self._stats.num_accepted_tokens += max(0, len(result.tokens) - 1)
        if result.finish is not None:
            self.scheduler.remove(s)
            del self._sequences[s.request.id]
            self._stats.num_finished += 1
            self.queue_time.record_output(len(s.tokens) - len(s.request.prompt))
        output = result.to_output(s, logprobs)
        if is_first:
            output.cached_tokens, output.weight_version = s.num_cached_tokens, self.weight_version
            output.prompt_logprobs = s.prompt_logprobs if result.error is None else None
        return output

    def _fail(self, sequence: Sequence, reason: str) -> RequestOutput:
        """Finishes one request with an error."""
        if not sequence.is_finished:
            self.scheduler.remove(sequence)
        self._sequences.pop(sequence.request.id, None)
        self._stats.num_finished += 1
        return RequestOutput(request_id=sequence.request.id, finish="error", error=reason)

    def stats(self) -> Stats:
        scheduler, kv_manager = self.scheduler, self.runner.kv_manager
        return dataclasses.replace(
            self._stats,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_cache_usage=kv_manager.usage(scheduler.running),
            preemptions=scheduler.num_preemptions,
            num_lookup_tokens=kv_manager.num_lookup_tokens,
            num_hit_tokens=kv_manager.num_hit_tokens,
            num_queued=self.queue_time.num_waits,
            queue_seconds=self.queue_time.total_wait_s,
        )

    def check_integrity(self) -> None:
        """AssertionError if a slot, memory or a request has leaked. Cheap; meant for when idle."""
        self.scheduler.check_integrity()
        queues = {*self.scheduler.running, *self.scheduler.waiting}
        assert queues == set(self._sequences.values()), "a sequence is lost, or not in a queue"
        for sequence in self.scheduler.running:
            assert 0 <= sequence.num_computed_tokens < sequence.num_tokens
            assert len(sequence.tokens) <= sequence.max_length
            assert sequence.num_placeholders <= (self._in_flight is not None)
