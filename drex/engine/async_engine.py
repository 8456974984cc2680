"""The engine in a thread of its own: requests, aborts and questions go in through a queue, tokens come out as streams.

Invariants: only the engine's thread touches the engine, only the event loop's thread touches streams. What a pass
brought crosses over in one call. Every stream ends, with the last of its requests or with an error.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from drex.engine.engine import Engine
from drex.engine.heap import settled_heap
from drex.engine.metrics import PassRecord
from drex.outputs import Chunk, CompletionOutput
from drex.request import Request

log = logging.getLogger(__name__)
T = TypeVar("T")
KEPT_TIMES = 4096
"""Of each kind, that the engine's own percentiles are over; older ones are forgotten."""


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

    Attributes:
        requests: in the order in which they were given.
    """

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request]) -> None:
        self.requests = requests
        self._engine = engine
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
        self._engine.drop(self, self._left)
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


class _Job(NamedTuple):
    """A request as the engine's thread knows it."""

    request: Request
    stream: Stream
    timing: Timing


class AsyncEngine:
    """Serves streams on an event loop from an engine that runs in a thread.

    Args:
        engine: idle, and used by nobody else from `start` to `stop`.
        observer: hears of everything.

    Attributes:
        unfinished: requests that were submitted and have not ended.
        stopped: set when the thread has ended, for whatever reason.
        failure: why it ended, if it failed.
    """

    def __init__(self, engine: Engine, observer: Observer) -> None:
        self.unfinished = 0
        self.failure: BaseException | None = None
        self.stopped = asyncio.Event()
        self._engine, self._observer = engine, observer
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: set[Stream] = set()
        self._questions: set[asyncio.Future[Any]] = set()
        self._jobs: dict[str, _Job] = {}
        self._unstarted: dict[str, Timing] = {}
        self._thread = threading.Thread(target=self._run, name="drex-engine", daemon=True)

    # In the event loop's thread

    def start(self) -> None:
        """Start the thread; called in the running event loop that the streams are for."""
        self._loop = asyncio.get_running_loop()
        self._engine.history = []
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present pass; streams that are open fail."""
        self._inbox.put(None)
        await self.stopped.wait()
        self._thread.join()

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Serve requests that passed `Intake`, as one group.

        Raises:
            EngineStoppedError: it serves no more.
        """
        self._check_alive()
        stream = Stream(self, requests)
        self._streams.add(stream)
        self.unfinished += len(requests)
        self._inbox.put(partial(self._add, stream, self._engine.executor.now()))
        return stream

    def drop(self, stream: Stream, left: set[str]) -> None:
        """Abort what is left of a stream, and forget it."""
        if stream in self._streams:
            self._streams.remove(stream)
            self.unfinished -= len(left)
        if left:
            self._inbox.put(partial(self._abort, frozenset(left)))

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """What a function of the engine returns, called between two passes.

        Raises:
            EngineStoppedError: it answers no more.
        """
        self._check_alive()
        answer: asyncio.Future[T] = self._loop.create_future()
        self._questions.add(answer)
        self._inbox.put(partial(self._answer, question, answer))
        try:
            return await answer
        finally:
            self._questions.discard(answer)

    def _check_alive(self) -> None:
        if self.stopped.is_set():
            raise EngineStoppedError("the engine has stopped: start the server again")

    def _deliver(self, news: dict[Stream, list[Event]]) -> None:
        for stream, events in news.items():
            if stream in self._streams:
                self.unfinished -= sum(event.whole is not None for event in events)
                stream.push(events)

    def _ended(self, failure: BaseException | None) -> None:
        self.failure = failure
        self.stopped.set()
        error = failure or EngineStoppedError("the engine was stopped")
        for stream in self._streams:
            stream.fail(error)
        for question in self._questions:
            if not question.done():
                question.set_exception(EngineStoppedError("the engine has stopped"))
        self._streams.clear()
        self.unfinished = 0

    # In the engine's thread

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            with settled_heap():
                while self._obey():
                    self._step()
            self._abort(frozenset(self._jobs))
        except BaseException as error:
            log.critical("the engine failed: all that is open ends with an error", exc_info=True)
            failure = error
        self._loop.call_soon_threadsafe(self._ended, failure)

    def _obey(self) -> bool:
        """Run what is in the inbox, and wait there while idle; False when told to stop."""
        while True:
            try:
                command = self._inbox.get(block=not self._engine.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _add(self, stream: Stream, arrived: float) -> None:
        for request in stream.requests:
            timing = self._unstarted[request.request_id] = Timing(arrived)
            self._jobs[request.request_id] = _Job(request, stream, timing)
            self._engine.add(request, arrived)

    def _abort(self, request_ids: frozenset[str]) -> None:
        for request_id in request_ids:
            job = self._jobs.pop(request_id, None)
            if job is not None:
                self._unstarted.pop(request_id, None)
                self._engine.abort(request_id)
                self._observer.aborted(job.request, job.timing)

    def _answer(self, question: Callable[[Engine], T], answer: asyncio.Future[T]) -> None:
        try:
            found, error = question(self._engine), None
        except Exception as caught:  # whoever asked hears of it; the engine goes on
            found, error = None, caught
        self._loop.call_soon_threadsafe(_settle, answer, found, error)

    def _step(self) -> None:
        """One pass, and what it brought."""
        engine, observer = self._engine, self._observer
        began = engine.executor.now()
        emitted = engine.step()
        now = engine.executor.now()
        self._note_started(began)
        news: dict[Stream, list[Event]] = {}
        for request_id, chunk, whole in emitted:
            job = self._jobs[request_id]
            event = Event(job.request, chunk, whole)
            if whole is not None:
                del self._jobs[request_id]
                if self._unstarted.pop(request_id, None) is not None:
                    job.timing.started = began
            observer.emitted(event, job.timing, now)
            job.timing.latest = now
            news.setdefault(job.stream, []).append(event)
        if news:
            self._loop.call_soon_threadsafe(self._deliver, news)
        assert engine.history is not None
        for record in engine.history:
            observer.passed(record)
        engine.history.clear()
        engine.metrics.trim(KEPT_TIMES)

    def _note_started(self, began: float) -> None:
        if self._unstarted:
            for request in self._engine.scheduler.admission.running:
                timing = self._unstarted.pop(request.request_id, None)
                if timing is not None:
                    timing.started = began


def _settle(answer: asyncio.Future[Any], found: Any, error: Exception | None) -> None:
    """Give an answer, unless whoever asked has gone."""
    if answer.done():
        return
    if error is None:
        answer.set_result(found)
    else:
        answer.set_exception(error)
