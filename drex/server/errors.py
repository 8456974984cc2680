"""Every error a client sees has OpenAI's body, an HTTP status, and a message that names the remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from drex.engine.streams import EngineStoppedError
from drex.server.replies import ErrorReply
from drex.server.schema import FORMS, UNSUPPORTED, EarlyExitOptions
from drex.server.streaming import encode

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
"""Of errors; below 500 others are the request's, from 500 on the server's."""
FIELD = re.compile(r"^(?:the )?([a-z][a-z_]*)")
PART = re.compile(r"^(?!(?:str|int|float|bool)$)[a-z0-9_]+$")
"""Of a path to what is wrong: fields and indices, without the names of types that were tried."""
LONGEST_MESSAGE = 500


class ApiError(Exception):
    """An error to be sent to the client.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do about it.
        param: the field at fault.
        headers: more of them.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    @classmethod
    def of(cls, error: ValueError, fields: Sequence[str]) -> ApiError:
        """What the library refused: its messages begin with the field, or `early_exit`'s, if they are about one."""
        found = FIELD.match(str(error))
        name = found[1] if found else None
        if name in EarlyExitOptions.model_fields and "early_exit" in fields:
            return cls(400, f"early_exit.{error}", "early_exit")
        return cls(400, str(error), name if name in fields else None)

    def body(self) -> ErrorReply:
        """OpenAI's error body."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message if len(self.message) <= LONGEST_MESSAGE else self.message[:LONGEST_MESSAGE] + "…"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> Response:
        """The body, with status and headers."""
        return Response(encode(self.body()), self.status, dict(self.headers or {}), "application/json")


ERRORS = {
    400: "What was asked can't be served.",
    401: "An API key is missing or wrong.",
    404: "No such model.",
    405: "No such method.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    500: "A pass failed.",
    503: "The server is shutting down, or its engine has stopped.",
    504: "The request took too long.",
}


def documented(reply: Any, *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """Responses of an endpoint, for the OpenAPI schema."""
    good: dict[str, Any] = {"model": reply}
    if streams:
        good["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": text} for status, text in ERRORS.items()
    }
    return {200: good, **errors}


def install(app: FastAPI) -> None:
    """Make every error of an application one of these."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return explain(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # from below FastAPI's reading of the body
            return error.__cause__.response()
        said = str(error.detail)
        if error.status_code == 404:
            said = f"there is no {request.url.path} here: GET /openapi.json lists what there is"
        elif error.status_code == 405:
            said = f"{request.url.path} does not take {request.method}"
        elif error.status_code == 400:
            said = "the body is not JSON that can be read: send UTF-8, and numbers and nesting of a sensible size"
        return ApiError(error.status_code, said, headers=error.headers).response()

    @app.exception_handler(EngineStoppedError)
    async def stopped(_: Request, error: EngineStoppedError) -> Response:
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)).response()


def explain(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body, in words."""
    first = errors[0]
    location = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if len(location) < 2:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    field = location[1]
    if first["type"] == "extra_forbidden":
        path = ".".join(part for part in location[1:-1] if PART.match(part))
        name = f"{path}.{location[-1]}" if path else location[-1]
        return ApiError(400, f"{name} is not a field that is known here: leave it out", field)
    if field in UNSUPPORTED:
        return ApiError(400, f"{field} is not supported: leave it out", field)
    if field in FORMS:
        return ApiError(400, f"{field}: give {FORMS[field]}", field)
    # A value that may be of several types has an error for each; the innermost tells most.
    same = [error for error in errors if error["loc"][1] == first["loc"][1]]
    deepest = max(same, key=lambda error: len(error["loc"]))
    where = ".".join(part for part in map(str, deepest["loc"][1:]) if PART.match(part))
    return ApiError(400, f"{where}: {deepest['msg']}", field)
