"""The engine in a thread of its own: requests, aborts and questions go in through a queue, tokens come out as streams.

Invariants: only the engine's thread touches the engine, only the event loop's thread touches streams. What a pass
brought crosses over in one call. Every stream ends, with the last of its requests or with an error.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from drex.control.request import Request
from drex.engine.engine import Engine
from drex.engine.heap import settled_heap
from drex.engine.samples import Emitted, ended_with_error
from drex.engine.streams import EngineStoppedError, Event, Observer, Stream, Timing

log = logging.getLogger(__name__)
T = TypeVar("T")
KEPT_TIMES = 4096
"""Of each kind, that the engine's own percentiles are over; older ones are forgotten."""


LOOP_CHECK_SECONDS = 1.0
"""How often the engine's thread looks, while it has nothing to do, whether its event loop has been closed."""


class _LoopClosedError(RuntimeError):
    """The event loop was closed before `AsyncEngine.stop`: nobody is left to hear of anything."""


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
        """Start the thread; called in the running event loop that the streams are for.

        Raises:
            RuntimeError: the engine is in use.
        """
        if self._engine.reserved_by is not None or self._engine.busy:
            raise RuntimeError("the engine is in use: wait for what it serves, or stop whoever serves from it")
        self._loop = asyncio.get_running_loop()
        self._engine.reserved_by = "an AsyncEngine (as `drex serve` does)"
        self._engine.history = []
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present pass; streams that are open fail."""
        self._inbox.put(None)
        if not self._loop.is_closed():
            await self.stopped.wait()
        self._thread.join()

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Serve requests that passed `InputProcessor`, as one group.

        Raises:
            EngineStoppedError: it serves no more.
        """
        self._check_alive()
        stream = Stream(requests, self.drop)
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
        if self._loop.is_closed():
            raise EngineStoppedError(
                "the event loop that this AsyncEngine was started in has been closed: make a new one in the present "
                "loop, and call stop() before a loop ends"
            )

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
        except _LoopClosedError as error:
            log.error("the event loop was closed before AsyncEngine.stop(): what was open is aborted")
            failure = error
        except BaseException as error:
            log.critical("the engine failed: all that is open ends with an error", exc_info=True)
            failure = error
        try:
            if not self._engine.torn:
                self._abort(frozenset(self._jobs))
            self._engine.reserved_by = None
            self._tell(self._ended, failure)
        except _LoopClosedError:
            pass

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        """Call a function in the event loop's thread, soon.

        Raises:
            _LoopClosedError: there is no event loop any more.
        """
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError as error:
            raise _LoopClosedError from error

    def _obey(self) -> bool:
        """Run what is in the inbox, and wait there while idle; False when told to stop."""
        while True:
            idle = not self._engine.busy
            try:
                command = self._inbox.get(block=idle, timeout=LOOP_CHECK_SECONDS)
            except queue.Empty:
                if not idle:
                    return True
                if self._loop.is_closed():
                    raise _LoopClosedError from None
                continue
            if command is None:
                return False
            command()

    def _add(self, stream: Stream, arrived: float) -> None:
        for request in stream.requests:
            timing = self._unstarted[request.request_id] = Timing(arrived)
            self._jobs[request.request_id] = _Job(request, stream, timing)
            try:
                self._engine.add(request, arrived)
            except Exception as error:
                if self._engine.torn:
                    raise
                log.exception("request %s can't be served", request.request_id)
                self._unstarted.pop(request.request_id)
                self._emit([ended_with_error(request, f"{type(error).__name__}: {error}")], self._engine.executor.now())

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
        self._tell(_settle, answer, found, error)

    def _step(self) -> None:
        """One pass, and what it brought."""
        engine, observer = self._engine, self._observer
        began = engine.executor.now()
        emitted = engine.step()
        now = engine.executor.now()
        self._note_started(began)
        for request_id, _, whole in emitted:
            if whole is not None and self._unstarted.pop(request_id, None) is not None:
                self._jobs[request_id].timing.started = began
        self._emit(emitted, now)
        assert engine.history is not None
        for record in engine.history:
            observer.passed(record)
        engine.history.clear()
        engine.metrics.trim(KEPT_TIMES)

    def _emit(self, emitted: Sequence[Emitted], now: float) -> None:
        """Give the streams what came for them."""
        news: dict[Stream, list[Event]] = {}
        for request_id, chunk, whole in emitted:
            job = self._jobs[request_id]
            event = Event(job.request, chunk, whole)
            if whole is not None:
                del self._jobs[request_id]
            self._observer.emitted(event, job.timing, now)
            job.timing.latest = now
            news.setdefault(job.stream, []).append(event)
        if news:
            self._tell(self._deliver, news)

    def _note_started(self, began: float) -> None:
        if self._unstarted:
            for request in self._engine.scheduler.running():
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
