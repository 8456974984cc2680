"""What surrounds every request: its id, its line in the log, its key, and limits on its body. Plain ASGI."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from drex.server.errors import ApiError
from drex.server.serving import RETRY_AFTER, Serving
from drex.server.settings import Keys
from drex.server.streaming import GONE, ClientGoneError
from drex.server.telemetry import Telemetry

log = logging.getLogger("drex.server.access")
GUARDED = ("/v1", "/tokenize", "/detokenize")
"""Paths, with all below them, that need a key where keys are set."""
REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,128}$")
QUIET = ("/health", "/metrics", "/live", "/", "/static")
"""Paths, with all directly below them, whose requests are logged only if something is wrong with them."""


class RequestLog:
    """Gives a request its id (the client's, if it sent a sensible one), answers what fails, and writes a line.

    `scope["state"]` has `request_id`, and `log`, a dictionary to which handlers add.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.match(given) else secrets.token_hex(12)
        said: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, log=said)
        started, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except ClientGoneError:
            said["gone"] = True
        except asyncio.CancelledError:  # uvicorn's last word to what is open when the time to shut down is over
            if not status:
                await ApiError(503, "the server is shutting down: send the request elsewhere").response()(
                    scope, receive, noted
                )
        except ApiError as error:
            await error.response()(scope, receive, noted)
        except Exception:
            log.exception("a handler failed", extra={"fields": {"request_id": request_id}})
            if not status:
                await ApiError(500, "the server has an error; its log says more").response()(scope, receive, noted)
        status = GONE if said.pop("gone", False) else status
        self._note(scope, status, time.perf_counter() - started, said)

    def _note(self, scope: Scope, status: int, seconds: float, said: dict[str, Any]) -> None:
        route = scope.get("route")
        self._telemetry.replied(getattr(route, "path", "other"), status)
        level = logging.INFO if status < 500 else logging.ERROR
        if (scope["path"] in QUIET or scope["path"].rpartition("/")[0] in QUIET) and status < 400:
            level = logging.DEBUG
        client = scope.get("client")
        fields = {
            "request_id": scope["state"]["request_id"],
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(seconds * 1e3, 1),
            **said,
        }
        log.log(level, "request", extra={"fields": fields})


class Guard:
    """Lets only those with a key in, where keys are set."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and guarded(scope["path"]):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._keys.accept(key.strip().encode("latin-1", "replace")):
                raise ApiError(
                    401,
                    "an API key is missing or wrong: send Authorization: Bearer KEY",
                    headers={"www-authenticate": "Bearer"},
                )
        await self._app(scope, receive, send)


def guarded(path: str) -> bool:
    """Whether a path needs a key."""
    return any(path == start or path.startswith(f"{start}/") for start in GUARDED)


class BodyLimit:
    """Refuses bodies that are too large, too slow to come, or still coming when the server shuts down.

    Args:
        app: what is inside.
        serving: has the limits, and knows of the bodies that are coming.
    """

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving
        self._most, self._seconds = serving.settings.max_body_bytes, serving.settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > self._most:
            raise self._too_large()
        deadline = asyncio.get_running_loop().time() + self._seconds
        size, whole = 0, False

        async def counted() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            message = await self._next(receive, deadline)
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._most:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    async def _next(self, receive: Receive, deadline: float) -> Message:
        """What comes next; raises ApiError (408, 503) if nothing does before the deadline or the server's end."""
        serving = self._serving
        limit = asyncio.timeout_at(0 if serving.draining else deadline)
        serving.bodies.add(limit)
        try:
            async with limit:
                return await receive()
        except TimeoutError:
            if serving.draining:
                said = "the server is shutting down: send the request elsewhere"
                raise ApiError(503, said, headers={**RETRY_AFTER, "connection": "close"}) from None
            said = f"the body did not come within {self._seconds:g} s: send it faster"
            raise ApiError(408, said, headers={"connection": "close"}) from None
        finally:
            serving.bodies.discard(limit)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most} bytes: send less at a time")
