"""The HTTP server: OpenAI's API and the chat page, over any ``EngineClient``.

A request's way: ``body`` parses and validates it into a model of ``openai/schema``;
``openai/chat`` (or ``completions``, ``responses``) turns that into a ``GenerationRequest``;
``generation`` runs it and yields deltas; a ``ResponseBuilder`` formats these. Nothing here knows
where the engine runs.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import importlib.metadata
import json
import re
import secrets
import time
from collections.abc import Sequence
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from nanochat_ray.serve.access import AccessLog
from nanochat_ray.serve.auth import AuthMiddleware, BodySizeLimit, client_of
from nanochat_ray.serve.body import JsonRoute, from_validation, route_class
from nanochat_ray.serve.client import EngineClient, UnavailableError
from nanochat_ray.serve.generation import Limits
from nanochat_ray.serve.hosts import HostCheck
from nanochat_ray.serve.keys import KeyRing
from nanochat_ray.serve.metrics import (
    EngineMetrics,
    FollowMetrics,
    PrometheusSink,
    RequestMetrics,
    Sink,
    Tee,
)
from nanochat_ray.serve.openai import errors
from nanochat_ray.serve.openai.chat import ChatBuilder, chat_prompt, parse_chat
from nanochat_ray.serve.openai.completions import CompletionBuilder, parse_completion
from nanochat_ray.serve.openai.errors import ApiError
from nanochat_ray.serve.openai.logprobs import token_text
from nanochat_ray.serve.openai.schema.outputs import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    CompletionChunk,
    CompletionResponse,
    DetokenizeResponse,
    ErrorResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
    TokenizerInfo,
    VersionResponse,
)
from nanochat_ray.serve.openai.schema.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    PromptBody,
    TokenizeRequest,
)
from nanochat_ray.serve.openai.stream import respond
from nanochat_ray.serve.openapi import add_stream_schemas
from nanochat_ray.serve.refusals import HAS_BEGUN, Refusals
from nanochat_ray.serve.responses.builder import ResponsesBuilder
from nanochat_ray.serve.responses.request import parse_responses
from nanochat_ray.serve.responses.schema import (
    ResponsesEvent,
    ResponsesRequest,
    ResponsesResponse,
)
from nanochat_ray.serve.serving import Serving
from nanochat_ray.text.tokenizer import Tokenizer

FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request cannot be served as it is."},
    "5XX": {
        "model": ErrorResponse,
        "description": "The server cannot serve it now (503) or in time (504).",
    },
}
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer; with stream=true as server-sent events."}
}
STREAMS = {
    "/v1/completions": CompletionChunk,
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/responses": ResponsesEvent,
}
"""The shape of an event's data in the stream of each endpoint."""
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
    suggestions: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
) -> FastAPI:
    """The application.

    ``name``: the model's. ``max_model_len``: the engine's longest sequence, in tokens. ``keys``:
    API keys, one of which each request then needs. ``sink``: takes the metrics of requests, which
    ``/metrics`` has in any case. ``allowed_origins``: origins whose pages may send requests (CORS),
    or "*". ``suggestions``: questions that the chat page offers. ``allowed_hosts``:
    names that ``Host`` may have (``hosts``); none: any.
    """
    key_ring = KeyRing(keys)
    prometheus = PrometheusSink(name)
    metrics = RequestMetrics(Tee(prometheus, sink) if sink is not None else prometheus)
    serving = Serving(client, tokenizer, name, max_model_len, limits or Limits(), metrics)
    # FastAPI's documentation pages load scripts from elsewhere; /openapi.json remains.
    app = FastAPI(
        title="nanochat_ray", version=VERSION, docs_url=None, redoc_url=None, responses=FAILURES
    )
    app.router.route_class = JsonRoute
    app.state.refusals = Refusals(serving, key_ring, list(STREAMS), allowed_hosts)
    _add_error_handlers(app)
    app.add_middleware(
        BodySizeLimit,
        max_bytes=serving.limits.max_body_bytes,
        timeout_s=serving.limits.body_timeout_s,
    )
    app.add_middleware(AuthMiddleware, keys=key_ring)
    if allowed_origins:  # outside of auth: a preflight has no key, and browsers read refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-checkpoint", "retry-after"],
        )
    if allowed_hosts:
        app.add_middleware(HostCheck, hosts=allowed_hosts)
    app.add_middleware(AccessLog)
    _add_pages(app, serving, suggestions)
    _add_metrics(app, serving, prometheus)
    _add_models(app, serving)
    _add_tokens(app, serving)
    _add_generation(app, serving)
    return app


def _page(suggestions: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The chat page, and headers that allow its own script and style and nothing else."""
    page = resources.files(__package__).joinpath("chat.html").read_text(encoding="utf-8")
    meta_tag = '<meta name="suggestions" content="[]">'
    assert meta_tag in page
    page = page.replace(
        meta_tag, meta_tag.replace("[]", html.escape(json.dumps(list(suggestions))))
    )

    def source(tag: str) -> str:
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        return f"'sha256-{digest}'"

    policy = (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _add_pages(app: FastAPI, serving: Serving, suggestions: Sequence[str]) -> None:
    text, headers = _page(suggestions)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    @app.get("/health", response_model=HealthResponse)
    async def health_check() -> Response:
        try:
            health = await serving.client.health()
        except UnavailableError as error:
            return errors.unavailable(str(error)).response()
        return JSONResponse({"status": "ok", "model": serving.name, **health})

    @app.get("/version")
    async def version() -> VersionResponse:
        return {"version": VERSION}


def _add_metrics(app: FastAPI, serving: Serving, prometheus: PrometheusSink) -> None:
    engines, follow = EngineMetrics(prometheus), FollowMetrics(prometheus)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        with contextlib.suppress(UnavailableError):  # then the last values are repeated
            health = await serving.client.health()
            follow.update(health.get("follow", {}))
            stats = health["engines"]
            engines.update_all({e.get("replica", str(i)): e for i, e in enumerate(stats)})
        return Response(prometheus.text(), media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, serving: Serving) -> None:
    created = int(time.time())

    def card() -> ModelCard:
        return {
            "id": serving.name,
            "object": "model",
            "created": created,
            "owned_by": "nanochat_ray",
            "max_model_len": serving.max_model_len,
            "checkpoint": serving.client.weight_version or None,
        }

    @app.get("/v1/models/", include_in_schema=False)  # else it would ask for the model ""
    @app.get("/v1/models")
    async def models() -> ModelList:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: Annotated[str, Path(description="Name of the model.")]) -> ModelCard:
        serving.check_model(model)
        return card()


def _add_tokens(app: FastAPI, serving: Serving) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        serving.check_model(body.model)
        if body.messages is not None:
            fields = {name: getattr(body, name) for name in PromptBody.model_fields}
            chat = ChatRequest.model_construct(messages=body.messages, **fields)
            ids = await chat_prompt(serving, chat)
        elif body.add_special_tokens is False:
            special = serving.tokenizer.specials.get(body.prompt or "")
            ids = await serving.encode(body.prompt or "") if special is None else [special]
        else:
            ids = await serving.encode_document(body.prompt or "")
        answer: TokenizeResponse = {
            "count": len(ids),
            "max_model_len": serving.max_model_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            answer["token_strs"] = [token_text(serving.tokenizer, token) for token in ids]
        return answer

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        serving.check_model(body.model)
        serving.check_token_ids(body.tokens, "tokens")
        return {"prompt": serving.tokenizer.decode(body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """What lm-eval asks a server whose tokenizer it uses."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>",
            "model_max_length": serving.max_model_len,
        }


def _add_generation(app: FastAPI, serving: Serving) -> None:
    async def admit(request: HttpRequest) -> None:
        if not request.scope.get(HAS_BEGUN):
            await serving.admit(client_of(request))

    router = APIRouter(route_class=route_class(admit))

    @router.post("/v1/completions", response_model=CompletionResponse, responses=ANSWER)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        generation = await parse_completion(serving, body, client_of(http))
        name = f"cmpl-{secrets.token_hex(12)}"
        return await respond(CompletionBuilder(serving, generation, name), http)

    @router.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=ANSWER)
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        generation = await parse_chat(serving, body, client_of(http))
        name = f"chatcmpl-{secrets.token_hex(12)}"
        return await respond(ChatBuilder(serving, generation, name), http)

    @router.post("/v1/responses", response_model=ResponsesResponse, responses=ANSWER)
    async def responses(body: ResponsesRequest, http: HttpRequest) -> Response:
        generation = await parse_responses(serving, body, client_of(http))
        return await respond(ResponsesBuilder(serving, generation, body), http)

    app.include_router(router)
    add_stream_schemas(app, STREAMS)


_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout"}


def _add_error_handlers(app: FastAPI) -> None:
    """Gives every failure of a request OpenAI's form; ``access`` does the same for defects."""

    @app.exception_handler(ApiError)
    async def on_api_error(_: HttpRequest, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(http: HttpRequest, error: HTTPException) -> JSONResponse:
        status, headers = error.status_code, error.headers or {}
        message, call = str(error.detail), f"{http.method} {http.url.path}"
        if status == 404:
            message = f"{call} does not exist on this server: /openapi.json names what does."
        elif status == 405:
            message = f"{call} is not allowed: {headers['Allow']}."
        response = ApiError(status, message, code=_CODES.get(status)).response()
        response.headers.update(headers)
        return response
