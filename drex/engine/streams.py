"""What crosses from the engine's thread to an event loop: events, the streams they come in, and who observes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from drex.control.request import Request
from drex.engine.metrics import PassRecord
from drex.outputs import Chunk, CompletionOutput


class EngineStoppedError(RuntimeError):
    """The engine's thread has ended: it failed, or was stopped. Nothing is served any more."""


class Event(NamedTuple):
    """What a request got: what is new, and the whole sample once it is finished."""

    request: Request
    chunk: Chunk
    whole: CompletionOutput | None


@dataclass
class Timing:
    """When things happened to a request, in seconds of the executor's clock.

    Attributes:
        arrived: it came.
        started: the first pass that it took part in began.
        latest: the last token so far came.
    """

    arrived: float
    started: float | None = None
    latest: float | None = None


class Observer(Protocol):
    """Hears of everything, in the engine's thread between passes: it must be quick and must not raise."""

    def passed(self, record: PassRecord) -> None:
        """A pass was run."""

    def emitted(self, event: Event, timing: Timing, now: float) -> None:
        """A request got tokens or ended; `timing.latest` is of the tokens before these."""

    def aborted(self, request: Request, timing: Timing) -> None:
        """A request was aborted: nobody waits for it any more."""


class Stream:
    """What a group of requests gives, as it comes; made by `AsyncEngine.submit`. Close it to abort what is left.

    Args:
        requests: the group.
        drop: aborts the requests of a stream that have not ended, given their ids.

    Attributes:
        requests: in the order in which they were given.
    """

    def __init__(self, requests: Sequence[Request], drop: Callable[[Stream, set[str]], None]) -> None:
        self.requests = requests
        self._drop = drop
        self._left = {request.request_id for request in requests}
        self._events: list[Event] = []
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Batches of events, each with all that has come since the one before; ends with the last request.

        Raises:
            EngineStoppedError: the engine ended first.
        """
        while self._left or self._events:
            await self._news.wait()
            self._news.clear()
            events, self._events = self._events, []
            if events:
                yield events
            if self._error is not None:
                raise EngineStoppedError("the engine has stopped; the request was not finished") from self._error

    def close(self) -> None:
        """Abort the requests that have not ended; what they hold is free after the present pass."""
        self._drop(self, self._left)
        self._left = set()

    def push(self, events: list[Event]) -> None:
        """Take in what came, in the event loop's thread."""
        self._left.difference_update(event.request.request_id for event in events if event.whole is not None)
        self._events.extend(events)
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """Nothing more will come."""
        self._error = error
        self._news.set()
