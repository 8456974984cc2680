"""Replies that end with their client: work stops, and what it holds is freed, as soon as the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
GONE = 499
"""Status noted for a client that did not wait (nginx's); nobody gets it."""


class ClientGoneError(Exception):
    """Nobody waits for this reply any more."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client goes; its request must have been read.

    Raises:
        ClientGoneError: it went, or did not take what it was sent before its time was over.
    """
    gone = asyncio.ensure_future(_disconnected(receive))

    async def unless_before() -> T:
        result = await work
        if gone.done():  # what was sent since then went nowhere; once all is sent, it ends as well
            raise ClientGoneError
        return result

    task = asyncio.ensure_future(unless_before())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.cancelled():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def encode(data: Any) -> bytes:
    """JSON in ASCII: what a client sent, and is sent back, need not be valid UTF-8."""
    return ENCODER.encode(data).encode()


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(data) + b"\n\n"


class EventStream(Response):
    """Server-sent events.

    Args:
        events: pieces to send, each with one or more whole events; closed when all is sent or the client goes.
        patience: seconds that the client has to take a piece; one that does not read is as good as gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], patience: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._patience = events, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events):
            try:
                await unless_gone(receive, self._send(send))
            except ClientGoneError:
                scope["state"]["log"]["gone"] = True

    async def _send(self, send: Send) -> None:
        async for piece in self._events:
            try:
                async with asyncio.timeout(self._patience):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except TimeoutError:
                raise ClientGoneError from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})
