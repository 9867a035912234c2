"""Sends an answer, whole or as server-sent events, and ends the work if the client disconnects."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from nanochat_ray.engine.request import EngineFull
from nanochat_ray.serve.client import UnavailableError
from nanochat_ray.serve.generation import (
    DeadlineError,
    Delta,
    EngineFailedError,
    GrammarError,
)
from nanochat_ray.serve.metrics import REFUSALS
from nanochat_ray.serve.openai import errors
from nanochat_ray.serve.openai.builder import ResponseBuilder
from nanochat_ray.serve.openai.errors import ApiError
from nanochat_ray.serve.sse import ClientGoneError, EventStream, unless_gone

Deltas = AsyncGenerator[list[Delta], None]


async def respond(builder: ResponseBuilder, http: HttpRequest) -> Response:
    """Raises ApiError if there is no answer."""
    try:
        return await _respond(builder, http)
    except ApiError as error:
        if (status := str(error.status)) in REFUSALS:
            builder.serving.metrics.refusals(1, status)
        raise


async def _respond(builder: ResponseBuilder, http: HttpRequest) -> Response:
    deltas = builder.serving.generate(builder.generation)
    try:
        if builder.generation.stream:
            # An error before the first token has its status code: clients retry by that.
            first = await unless_gone(http, _next(deltas, builder))
            builder.name_weights(first)
            return EventStream(_events(first, deltas, builder), builder.headers)
        try:
            await unless_gone(http, _collect(deltas, builder))
        finally:
            await deltas.aclose()
    except ClientGoneError:
        await deltas.aclose()
        return Response(status_code=499)
    return JSONResponse(builder.response(), headers=builder.headers)


async def _next(deltas: Deltas, builder: ResponseBuilder) -> list[Delta]:
    """The next deltas. Raises ApiError if the engine fails, StopAsyncIteration at the end."""
    try:
        return await anext(deltas)
    except EngineFull as error:
        if len(builder.generation.requests) == 1:  # of several, one may have been admitted
            request = builder.generation.requests[0]
            builder.serving.gate.record(request.client, request.priority, error)
        raise errors.queue_full(str(error), error.retry_after_s) from error
    except UnavailableError as error:
        raise errors.unavailable(str(error)) from error
    except DeadlineError as error:
        raise errors.request_timeout(str(error)) from error
    except (GrammarError, ValueError) as error:
        raise errors.invalid_field(error, builder.generation.grammar_field) from error
    except EngineFailedError as error:
        raise errors.engine_failed(str(error)) from error


async def _collect(deltas: Deltas, builder: ResponseBuilder) -> None:
    with contextlib.suppress(StopAsyncIteration):
        while True:
            step = await _next(deltas, builder)
            if not builder.weight_version:
                builder.name_weights(step)
            for delta in step:
                builder.add(delta)


async def _events(
    step: list[Delta], deltas: Deltas, builder: ResponseBuilder
) -> AsyncGenerator[str, None]:
    """The events of a stream, those of one step of the engine as one text: ``step``, then
    ``deltas``. An error after the first token is an event."""
    try:
        events = builder.opening()
        with contextlib.suppress(StopAsyncIteration):
            while True:
                for delta in step:
                    builder.add(delta)
                    if delta.is_visible:
                        events += builder.chunks(delta)
                if events:
                    yield events
                events = ""
                step = await _next(deltas, builder)
        yield builder.closing()
    except ApiError as error:
        yield builder.failure(error)
    finally:
        await deltas.aclose()
