"""Failures as OpenAI's object: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
import re

from fastapi.responses import JSONResponse

from nanochat_ray.serve.openai.schema.outputs import ErrorResponse

INVALID = "invalid_request_error"
MAX_MESSAGE = 500
"""Characters."""
MAX_RETRY_AFTER_S = 60
"""OpenAI's clients wait no longer for ``Retry-After``: beyond it they use a delay of their own."""


class ApiError(Exception):
    """A failure with its HTTP status. ``retry_after`` (seconds) becomes a header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        # It may contain what the client sent: of any length, with lone surrogates.
        message = message.encode(errors="replace").decode()
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}…"
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param = param and param.encode(errors="replace").decode()[:100]
        self.code, self.retry_after = code, retry_after

    def body(self) -> ErrorResponse:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 504:
            headers["x-should-retry"] = "false"
        return JSONResponse(self.body(), self.status, headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def invalid_field(
    error: Exception, grammar_field: str = "", default: str | None = None
) -> ApiError:
    """An error that begins with a field, else of the field ``default``. ``SamplingParams`` has the
    names of the requests, but for its ``grammar``, which is of the field ``grammar_field``."""
    message = str(error)
    if grammar_field:
        message = re.sub(r"^grammar\b", grammar_field, message)
    field = re.match(r"[\w.\[\]]+(?=[=:])", message)
    return invalid(message, field[0] if field else default)


def unknown_model(name: str, model: str) -> ApiError:
    message = f"The model {name!r} does not exist; this server has {model!r}."
    return ApiError(404, message, param="model", code="model_not_found")


def queue_full(message: str, retry_after_s: float = 1.0) -> ApiError:
    retry_after = min(MAX_RETRY_AFTER_S, max(1, math.ceil(retry_after_s)))
    return ApiError(
        429, message, kind="rate_limit_error", code="queue_full", retry_after=retry_after
    )


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind="server_error", code="engine_unavailable", retry_after=2)


def request_timeout(message: str) -> ApiError:
    """OpenAI documents no status for it and vLLM has no such limit. 408 would say that the client
    was slow to send; Anthropic, Gemini and Mistral answer 504. OpenAI's clients retry both twice,
    unless ``x-should-retry`` says that another attempt would time out too."""
    return ApiError(504, message, kind="server_error", code="request_timeout")


def engine_failed(message: str) -> ApiError:
    return ApiError(500, message, kind="server_error", code="engine_failed")


def internal() -> ApiError:
    return ApiError(500, "The server failed; its log says why.", kind="server_error")
