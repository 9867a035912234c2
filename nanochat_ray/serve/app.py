"""The HTTP server: OpenAI's API and the chat page, over any ``EngineClient``.

A request's way: ``protocol`` checks its shape, ``Service`` turns it into engine requests,
``completions`` turns tokens into text, and the routes here give that its OpenAI form, whole or as
events. Nothing here knows where the engine runs.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from nanochat_ray.engine.request import EngineFull
from nanochat_ray.serve import errors
from nanochat_ray.serve.access import AccessLog
from nanochat_ray.serve.auth import AuthMiddleware, BodySizeLimit, client_of
from nanochat_ray.serve.body import JsonRoute
from nanochat_ray.serve.client import EngineClient, UnavailableError
from nanochat_ray.serve.errors import ApiError
from nanochat_ray.serve.generation import (
    DeadlineError,
    Delta,
    EngineFailedError,
    GenerationRequest,
    GrammarError,
    generate,
)
from nanochat_ray.serve.metrics import (
    EngineMetrics,
    PrometheusSink,
    RequestMetrics,
    Sink,
    Tee,
)
from nanochat_ray.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from nanochat_ray.serve.responses import (
    ChatResponse,
    CompletionResponse,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    VersionResponse,
)
from nanochat_ray.serve.responses_api import responses_job
from nanochat_ray.serve.responses_request import ResponsesRequest
from nanochat_ray.serve.responses_shape import ResponsesShape
from nanochat_ray.serve.service import Limits, Service
from nanochat_ray.serve.shapes import ChatShape, CompletionShape, Shape
from nanochat_ray.serve.sse import ClientGoneError, EventStream, unless_gone
from nanochat_ray.text.tokenizer import Tokenizer

FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served as it is."},
    "5XX": {
        "model": ErrorResponse,
        "description": "The server cannot serve it now (503) or in time (504).",
    },
}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream=true as server-sent events.",
        "content": {"text/event-stream": {}},
    }
}
try:
    VERSION = importlib.metadata.version("nanochat_ray")
except importlib.metadata.PackageNotFoundError:  # run from its folder
    VERSION = "0"


def build_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    name: str,
    max_model_len: int,
    *,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    sink: Sink | None = None,
    allowed_origins: Sequence[str] = (),
) -> FastAPI:
    """The application. ``name`` is the model's, ``max_model_len`` the engine's longest sequence in
    tokens, ``keys`` the API keys of which one is then needed, ``sink`` where figures of requests
    go besides ``/metrics``, ``allowed_origins`` those whose pages may ask (CORS), or "*"."""
    page = PrometheusSink(name)
    metrics = RequestMetrics(Tee(page, sink) if sink is not None else page)
    service = Service(client, tokenizer, name, max_model_len, limits or Limits(), metrics)
    # FastAPI's documentation pages load scripts from elsewhere; /openapi.json remains.
    app = FastAPI(
        title="nanochat_ray", version=VERSION, docs_url=None, redoc_url=None, responses=FAILURES
    )
    app.router.route_class = JsonRoute
    errors.install(app)
    app.add_middleware(
        BodySizeLimit,
        max_bytes=service.limits.max_body_bytes,
        timeout_s=service.limits.body_timeout_s,
    )
    app.add_middleware(AuthMiddleware, keys=keys)
    if allowed_origins:  # outside of auth: a preflight has no key, and browsers read refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(AccessLog)
    _add_pages(app, service)
    _add_metrics(app, service, page)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_generation(app, service)
    return app


def _page() -> tuple[str, dict[str, str]]:
    """The chat page, and headers that let it run its own script and style and nothing else."""
    html = resources.files(__package__).joinpath("chat.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        return f"'sha256-{digest}'"

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return html, {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _add_pages(app: FastAPI, service: Service) -> None:
    html, headers = _page()

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    @app.get("/health")
    async def health() -> Response:
        try:
            figures = await service.client.health()
        except UnavailableError as error:
            return errors.unavailable(str(error)).response()
        return JSONResponse({"status": "ok", "model": service.name, **figures})

    @app.get("/version")
    async def version() -> VersionResponse:
        return VersionResponse(version=VERSION)


def _add_metrics(app: FastAPI, service: Service, page: PrometheusSink) -> None:
    engines = EngineMetrics(page)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        with contextlib.suppress(UnavailableError):  # then the last figures stand
            found = (await service.client.health())["engines"]
            engines.put_all({e.get("replica", str(i)): e for i, e in enumerate(found)})
        return Response(page.text(), media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, service: Service) -> None:
    card = ModelCard(id=service.name, created=int(time.time()), max_model_len=service.max_model_len)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        service.check_model(model)
        return card


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        service.check_model(body.model)
        if body.messages is not None:
            ids = await service.chat_prompt(ChatRequest(messages=body.messages))
        else:
            bare = body.add_special_tokens is False
            ids = await (service.encode if bare else service.text_prompt)(body.prompt or "")
        return TokenizeResponse(count=len(ids), max_model_len=service.max_model_len, tokens=ids)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        service.check_model(body.model)
        service.check_ids(body.tokens, "tokens")
        return DetokenizeResponse(prompt=service.tokenizer.decode(body.tokens))


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=CompletionResponse, responses=STREAMED)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        job = await service.completion_job(body, client_of(http))
        shape = CompletionShape(service, job, f"cmpl-{secrets.token_hex(12)}")
        return await _respond(service, job, shape, http)

    @app.post("/v1/chat/completions", response_model=ChatResponse, responses=STREAMED)
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        job = await service.chat_job(body, client_of(http))
        shape = ChatShape(service, job, f"chatcmpl-{secrets.token_hex(12)}")
        return await _respond(service, job, shape, http)

    @app.post("/v1/responses", responses=STREAMED)
    async def responses(body: ResponsesRequest, http: HttpRequest) -> Response:
        job = await responses_job(service, body, client_of(http))
        return await _respond(service, job, ResponsesShape(service, job, body), http)


async def _respond(
    service: Service, job: GenerationRequest, shape: Shape, http: HttpRequest
) -> Response:
    timeout = service.limits.request_timeout_s
    pieces = generate(service.client, service.tokenizer, service.metrics, job, timeout)
    try:
        if job.stream:
            # What fails before the first token gets its status: clients try again by that.
            first = await unless_gone(http, _translated(pieces.__anext__))
            return EventStream(_events(first, pieces, shape, job.include_usage))
        try:
            await unless_gone(http, _gather(pieces, shape))
        finally:
            await pieces.aclose()
    except ClientGoneError:
        await pieces.aclose()
        return Response(status_code=499)
    return JSONResponse(shape.whole())


async def _translated(step: Callable[[], Awaitable[list[Delta]]]) -> list[Delta]:
    """The next pieces; failures of the engine as the errors that clients see."""
    try:
        return await step()
    except EngineFull as error:
        raise errors.overloaded(str(error)) from error
    except UnavailableError as error:
        raise errors.unavailable(str(error)) from error
    except DeadlineError as error:
        raise errors.too_late(str(error)) from error
    except GrammarError as error:
        raise errors.invalid(str(error)) from error
    except EngineFailedError as error:
        raise ApiError(500, str(error), kind="server_error", code="engine_failed") from error
    except ValueError as error:
        raise errors.invalid(str(error)) from error


async def _gather(pieces: AsyncGenerator[list[Delta], None], shape: Shape) -> None:
    with contextlib.suppress(StopAsyncIteration):
        while True:
            for piece in await _translated(pieces.__anext__):
                shape.take(piece)


async def _events(
    turn: list[Delta],
    pieces: AsyncGenerator[list[Delta], None],
    shape: Shape,
    include_usage: bool,
) -> AsyncGenerator[str, None]:
    """The events of a streamed answer, those that came together as one text: ``turn``, then
    ``pieces``. An error after its begin is an event of its own."""
    try:
        found = shape.opening()
        with contextlib.suppress(StopAsyncIteration):
            while True:
                for piece in turn:
                    shape.take(piece)
                    if piece.is_visible:
                        found += shape.deltas(piece)
                if found:
                    yield shape.frame(found)
                found = []
                turn = await _translated(pieces.__anext__)
        yield shape.closing(include_usage)
    except ApiError as error:
        yield shape.failure(error)
    finally:
        await pieces.aclose()
