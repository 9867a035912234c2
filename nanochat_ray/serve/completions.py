"""From an engine's tokens to what a client reads: text, calculations, why it ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from nanochat_ray.engine.detokenizer import IncrementalDetokenizer
from nanochat_ray.engine.request import EngineFull, Output, TokenLogprob
from nanochat_ray.serve.client import OutputStream
from nanochat_ray.serve.logprobs import Scored
from nanochat_ray.serve.metrics import Timer
from nanochat_ray.serve.responses import Calculation, FinishReason
from nanochat_ray.serve.service import Job, Service
from nanochat_ray.serve.tool_calls import CallDelta, CallStream, ToolCalling
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass
class Piece:
    """What one turn of the engine added to one choice."""

    index: int
    text: str = ""
    calculations: list[Calculation] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    """Tokens of the text with their log-probabilities, if those were asked for."""
    prompt: list[TokenLogprob | None] = field(default_factory=list)
    """Of the prompt's tokens, with the first piece, if those were asked for."""
    tokens: int = 0
    cached: int = 0
    """Prompt tokens that needed no computation."""
    calls: list[CallDelta] = field(default_factory=list)
    """Of a call that the client is to run."""
    finish: FinishReason | None = None


class EngineFailedError(Exception):
    """The engine gave a request up."""


class GrammarError(EngineFailedError):
    """It gave it up because what the client wants its answer to fit is too much to follow."""


class DeadlineError(EngineFailedError):
    """It gave it up because the request's time was over."""


class Answer:
    """Turns one choice's token ids into pieces.

    A calculator turn, ``<|python_start|> … <|output_end|>``, leaves the text and becomes one
    ``Calculation``; other special tokens have no text. ``text`` of all pieces together never
    splits a character and ends before a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: int,
        stop: Sequence[str],
        calling: ToolCalling = ToolCalling(),  # noqa: B008 - it is frozen
        min_tokens: int = 0,
    ):
        """Stop strings count from the token behind the first ``min_tokens`` on, as in vLLM."""
        self.index = index
        self._min_tokens, self._num_tokens = min_tokens, 0
        self._calling = calling
        self._call_end = tokenizer.special("<|python_end|>") if calling.calculator else -1
        self._tokenizer = tokenizer
        self._text = IncrementalDetokenizer(tokenizer, stop)
        self._marks = {tokenizer.special(name): name for name in tokenizer.specials}
        # A forced call's first mark is the prompt's last token.
        self._inside = "<|python_start|>" if calling.forced else ""
        self._called = False
        self._call: CallStream | None = None
        if calling.grammar is not None:
            self._call = CallStream(calling.functions)
            self._call_text = IncrementalDetokenizer(tokenizer)
        self._held: list[int] = []
        self._expression = ""

    def feed(self, output: Output) -> Piece:
        piece = Piece(self.index, tokens=len(output.tokens), cached=output.cached_tokens)
        if output.prompt_logprobs is not None:
            piece.prompt = [None, *output.prompt_logprobs]  # nothing comes before the first
        # The token that ended the answer is no part of its text.
        tokens = output.tokens[:-1] if output.ended_by_last else output.tokens
        for i, token in enumerate(tokens):
            self._num_tokens += 1
            mark = self._marks.get(token)
            if mark is not None:
                self._mark(mark, piece)
                if self._called:
                    piece.tokens = i + 1
                    self.end(piece, "stop")
                    return piece
            elif self._call is not None:
                self._add_calls(piece, self._call.push(self._call_text.push((token,))))
            elif self._inside:
                self._held.append(token)
            else:
                if output.logprobs is not None and (found := output.logprobs[i]) is not None:
                    piece.scored.append((token, found))
                may_stop = self._num_tokens > self._min_tokens
                piece.text += self._text.push((token,), may_stop)
                if self._text.stopped:
                    piece.finish = "stop"
                    # What a step with draft tokens brought behind it is no part of the answer.
                    piece.tokens = i + 1
                    return piece
        if output.ended_by_last and output.tokens[-1] == self._call_end and self._inside:
            self._parse_call(self._tokenizer.decode(self._held), piece)
        return piece

    def end(self, piece: Piece, finish: FinishReason) -> None:
        """Adds what was held back in case a stop string or a character would follow."""
        if piece.finish is None:
            piece.text += self._text.flush()
            if self._call is not None:
                self._add_calls(piece, self._call.push(self._call_text.flush()))
                self._add_calls(piece, self._call.end(complete=finish == "stop"))
            piece.finish = self._finish(finish)

    def _finish(self, finish: FinishReason) -> FinishReason:
        # As at OpenAI, where a call that the client has named ends with "stop".
        is_call = self._called and finish == "stop" and self._calling.choice != "named"
        return "tool_calls" if is_call else finish

    def _add_calls(self, piece: Piece, calls: list[CallDelta]) -> None:
        self._called = self._called or bool(calls)
        piece.calls += calls

    def _parse_call(self, text: str, piece: Piece) -> None:
        if self._calling.choice != "none" and (call := self._calling.parse(text)) is not None:
            self._add_calls(piece, [call])

    def _mark(self, mark: str, piece: Piece) -> None:
        held = self._tokenizer.decode(self._held)
        self._held.clear()
        if mark in ("<|python_start|>", "<|output_start|>"):
            self._inside = mark
            return
        if mark == "<|python_end|>":
            self._expression = held
            if self._inside == "<|python_start|>":
                self._parse_call(held, piece)
        elif mark == "<|output_end|>":
            piece.calculations.append(Calculation(expression=self._expression, result=held))
        self._inside = ""


async def all_pieces(service: Service, job: Job) -> AsyncGenerator[list[Piece], None]:
    """Pieces of all choices as they come, each turn what came together; the requests run together.

    Closing the generator aborts what still runs. Raises EngineFailedError and what ``submit``
    raises.
    """
    stream = OutputStream()
    running: dict[str, tuple[Answer, Timer]] = {}
    try:
        for i, request in enumerate(job.requests):
            timer = service.metrics.timer()
            await service.client.submit(request, stream)
            timer.taken(len(request.prompt))
            least = request.params.min_tokens
            answer = Answer(service.tokenizer, i, job.stop, job.calling, least)
            running[request.id] = answer, timer
        async for outputs in stream:
            pieces = []
            for output in outputs:
                if output.request_id not in running:
                    continue  # a stop string has ended it already
                answer, timer = running[output.request_id]
                piece = answer.feed(output)
                if piece.tokens:
                    timer.tokens(piece.tokens)
                if output.finish in ("stop", "length"):
                    answer.end(piece, output.finish)
                elif output.finish is not None and piece.finish is None:
                    timer.end("error")
                    reason = output.error or f"the engine ended the answer ({output.finish})"
                    # An engine names what it failed on.
                    if reason.startswith("grammar:"):
                        raise GrammarError(reason)
                    if reason.startswith("deadline:"):
                        most = service.limits.request_timeout_s
                        raise DeadlineError(f"the answer was not ready after {most:g} s, the limit")
                    if reason.startswith("max_queue_size="):  # filled up after it was taken
                        raise EngineFull(reason)
                    raise EngineFailedError(reason)
                if piece.finish is not None:
                    timer.end("stop" if piece.finish == "tool_calls" else piece.finish)
                    del running[output.request_id]
                    stream.abort(output.request_id)
                pieces.append(piece)
            yield pieces
    finally:
        for _, timer in running.values():
            timer.end("abort")
        stream.close()
