"""Every failure as OpenAI's object: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

INVALID = "invalid_request_error"
MAX_MESSAGE = 500
"""Characters."""


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
        # Parts of what the client sent may be in it: of any length, with lone surrogates.
        message = message.encode(errors="replace").decode()
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}…"
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param = param and param.encode(errors="replace").decode()[:100]
        self.code, self.retry_after = code, retry_after

    def body(self) -> dict[str, Any]:
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


def unknown_model(name: str, served: str) -> ApiError:
    message = f"The model {name!r} does not exist; this server has {served!r}."
    return ApiError(404, message, param="model", code="model_not_found")


def overloaded(message: str) -> ApiError:
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", retry_after=1)


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind="server_error", code="engine_unavailable", retry_after=2)


def too_late(message: str) -> ApiError:
    """OpenAI documents no status for it and vLLM has no such limit. 408 would say that the client
    was slow to send; 504 is what Anthropic, Gemini and Mistral answer. OpenAI's clients try both
    again, twice, unless ``x-should-retry`` tells them that the answer would only be late again."""
    return ApiError(504, message, kind="server_error", code="request_timeout")


def internal() -> ApiError:
    return ApiError(500, "The server failed; its log says why.", kind="server_error")


def _field(location: Sequence[int | str]) -> str:
    """``("body", "messages", 0, "content")`` as ``messages[0].content``, without union tags."""
    name = ""
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and not part[:1].isupper() and part not in _UNION_TAGS:
            name += f".{part}" if name else part
    return name


def _depth(location: Sequence[int | str]) -> tuple[int, int]:
    """Levels, then items before the first wrong one."""
    levels = len(_PATH_PART.findall(_field(location)))
    return levels, max((part for part in location if isinstance(part, int)), default=0)


_PATH_PART = re.compile(r"\w+")
# What pydantic writes into a location for the branch of a union that it tried.
_UNION_TAGS = {"str", "int", "float", "list", "dict", "bool"}


def from_validation(problems: Sequence[Any]) -> ApiError:
    """The first of pydantic's problems, naming its field."""
    problem = problems[0]
    location = problem.get("loc", ())
    if problem["type"] in ("json_invalid", "value_error.jsondecode"):
        reason = problem.get("ctx", {}).get("error", "")
        return invalid(f"The body is not valid JSON: {reason}", code="invalid_json")
    param = _field(location)
    if problem["type"] == "missing" and not param:
        return invalid("A JSON object is needed as the body.")
    # A union reports every branch: the one that came furthest is what the client meant. Say all
    # that would have been right there, once.
    branches = [p for p in problems if p.get("loc", ())[:2] == location[:2]]
    param = _field(max((p.get("loc", ()) for p in branches), key=_depth))
    same = [p["msg"] for p in problems if _field(p.get("loc", ())) == param]
    message = " or ".join(dict.fromkeys(m.removeprefix("Value error, ") for m in same))
    if not param and (named := re.match(r"[a-z_]+(?=[=: ])", message)):
        return invalid(message, named[0])
    return invalid(f"{param}: {message}" if param else message, param or None)


_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout"}


def install(app: FastAPI) -> None:
    """Makes ``app`` answer every failure of a request in this form; defects are ``access``'s."""

    @app.exception_handler(ApiError)
    async def own(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout"}.get(
            error.status_code
        )
        found = ApiError(error.status_code, str(error.detail), code=code)
        answer = found.response()
        answer.headers.update(error.headers or {})
        return answer
