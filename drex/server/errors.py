"""Every error a client sees has OpenAI's body, an HTTP status, and a message that names the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from drex.engine.streams import EngineStoppedError
from drex.errors import SettingError
from drex.inputs.processor import ContextLengthError
from drex.server.explain import explain
from drex.server.replies import ErrorReply
from drex.server.schema import BODIES, EarlyExitOptions
from drex.server.streaming import ClientGoneError, encode

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
"""Of errors; below 500 others are the request's, from 500 on the server's."""
LONGEST_MESSAGE = 500
TOO_LONG = "context_length_exceeded"
"""OpenAI's code by which clients know that they have to shorten the prompt."""


class ApiError(Exception):
    """An error to be sent to the client.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do about it.
        param: the field at fault.
        headers: more of them.
        code: OpenAI's name for the error, where clients go by it; None: the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers, self.code = status, message, param, headers, code

    @classmethod
    def of(cls, error: ValueError, fields: Sequence[str]) -> ApiError:
        """What the library refused.

        Args:
            error: it names the field at fault if it is a SettingError.
            fields: of the body.
        """
        if isinstance(error, ContextLengthError):
            return cls(400, str(error), "prompt" if "prompt" in fields else "messages", code=TOO_LONG)
        name = error.field if isinstance(error, SettingError) else None
        if name in EarlyExitOptions.model_fields and "early_exit" in fields:
            return cls(400, f"early_exit.{error}", "early_exit")
        return cls(400, str(error), name if name in fields else None)

    def body(self) -> ErrorReply:
        """OpenAI's error body."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = self.message if len(self.message) <= LONGEST_MESSAGE else self.message[:LONGEST_MESSAGE] + "…"
        code = self.status if self.code is None else self.code
        return {"error": {"message": message, "type": kind, "param": self.param, "code": code}}

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
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return ApiError(400, *explain(error.errors(), BODIES.get(request.url.path))).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, ApiError):  # from below FastAPI's reading of the body
            return error.__cause__.response()
        if isinstance(error.__cause__, ClientDisconnect):
            raise ClientGoneError from error
        said, headers = str(error.detail), dict(error.headers or {})
        if headers.get("Allow") == "GET":  # HEAD has a route of its own
            headers["Allow"] = "GET, HEAD"
        if error.status_code == 404:
            said = f"there is no {request.url.path} here: GET /openapi.json lists what there is"
        elif error.status_code == 405:
            said = f"{request.url.path} does not take {request.method}"
        elif error.status_code == 400:
            said = "the body is not JSON that can be read: send UTF-8, and numbers and nesting of a sensible size"
        return ApiError(error.status_code, said, headers=headers).response()

    @app.exception_handler(EngineStoppedError)
    async def stopped(_: Request, error: EngineStoppedError) -> Response:
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)).response()
