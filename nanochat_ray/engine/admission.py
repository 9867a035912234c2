"""From a request to a sequence: what a request must satisfy, and the state that it starts with."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanochat_ray.checks import short_repr
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.draft import PromptLookup
from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.engine.request import Finish, Request
from nanochat_ray.engine.sequence import Sequence
from nanochat_ray.text.tools import Tool, ToolState


@dataclass(frozen=True)
class Admission:
    """A sequence, and what it starts with if another engine has generated a part of its output."""

    sequence: Sequence
    tool_tokens: list[int] = field(default_factory=list)
    """The rest of a tool's output, which that engine did not report."""
    finish: Finish | None = None
    """Set if nothing is left to generate."""
    completes_grammar: bool = False


@dataclass(frozen=True)
class Admitter:
    """Validates requests. ``validate`` and ``prepare`` may be called from any thread."""

    config: EngineConfig
    max_model_len: int
    vocab_size: int
    tool: Tool | None
    grammars: Grammars | None

    def validate(self, request: Request) -> None:
        """ValueError if the engine can never process the request."""
        tokens = (*request.prompt, *request.output_token_ids)
        if not request.prompt:
            raise ValueError("prompt: it must have at least one token")
        if len(tokens) + min(1, request.params.max_tokens) > self.max_model_len:
            raise ValueError(
                f"prompt has {len(tokens)} tokens, but the context holds {self.max_model_len} "
                "together with at least one output token"
            )
        for name, ids in (
            ("prompt", tokens),
            ("logit_bias", tuple(request.params.logit_bias)),
            ("stop_ids", request.params.stop_ids),
            ("eos_ids", request.params.eos_ids),
        ):
            wrong = next((t for t in ids if not self._is_token(t)), None)
            if wrong is not None:
                rule = f"token ids from 0 to {self.vocab_size - 1}"
                raise ValueError(f"{name}={short_repr(wrong)} is not allowed: {rule}")
        if request.params.grammar is not None:
            if self.grammars is None:
                raise ValueError("grammar: this engine does not know the text of its tokens")
            self.grammars.check(request.params.grammar)

    def _is_token(self, token: object) -> bool:
        is_int = type(token) is int or isinstance(token, np.integer)
        return is_int and 0 <= token < self.vocab_size  # type: ignore[operator]

    def prepare(self, request: Request) -> Future[Any] | None:
        """The compilation of the request's grammar, for which ``validate`` waits; None without."""
        grammar = request.params.grammar
        return self.grammars.compile(grammar) if self.grammars and grammar else None

    def admit(self, request: Request) -> Admission:
        """The sequence of a valid request that has a seed."""
        params, output_ids, grammar = request.params, request.output_token_ids, None
        if self.grammars is not None and params.grammar is not None:
            limit = min(params.max_tokens, self.max_model_len - len(request.prompt))
            grammar = self.grammars.start(params.grammar, params.all_stop_ids, output_ids, limit)
        sequence = Sequence(
            request=request,
            tokens=[*request.prompt, *output_ids],
            seed=params.seed or 0,
            max_length=min(self.max_model_len, len(request.prompt) + params.max_tokens),
            # The output of a tool would not follow the grammar.
            tool=ToolState(self.tool) if self.tool and grammar is None else None,
            grammar=grammar,
            stop_token_ids=params.all_stop_ids,
            prefill_spans=[(0, len(request.prompt))],
            # The engine that generated the first part has reported them.
            prompt_logprobs=None if params.prompt_logprobs is None or output_ids else [],
        )
        if self.config.num_speculative_tokens:
            sequence.prompt_lookup = PromptLookup(self.config.prompt_lookup_max)
        tool_tokens: list[int] = []
        if sequence.tool is not None:
            tool_tokens, spans = sequence.tool.replay(output_ids)
            first = len(request.prompt)
            sequence.prefill_spans += [(first + start, first + end) for start, end in spans]
        if output_ids and (finish := sequence.finish_after(output_ids[-1])) is not None:
            return Admission(sequence, finish=finish)
        if grammar is not None and grammar.is_complete:
            return Admission(sequence, finish="stop", completes_grammar=True)
        # The engine before this one was lost while it injected a tool's output.
        tool_tokens = tool_tokens[: sequence.max_length - len(sequence.tokens)]
        sequence.tokens += tool_tokens
        is_full = bool(tool_tokens) and len(sequence.tokens) >= sequence.max_length
        return Admission(sequence, tool_tokens, "length" if is_full else None)
