"""Callers share one engine: whoever waits for tokens steps the engine for all, in any thread, one at a time.

Invariants: the engine is touched under the lock only. What a step brought is in the callers' inboxes before the lock is
given back; where an interruption kept it from getting there, the requests of all callers end with an error before the
engine is used again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from weakref import WeakValueDictionary

from drex.control.request import Request
from drex.engine.engine import Engine
from drex.engine.heap import settled_heap
from drex.engine.samples import Emitted, ended_with_error

T = TypeVar("T")
INTERRUPTED = "an interruption in the middle of another call's bookkeeping ended this request: send it again"


class EngineReservedError(RuntimeError):
    """The engine serves somebody else, who alone may use it."""


class _Call:
    """A caller: its requests that have not ended, and what they were given since it last looked."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.left = {request.request_id: request for request in requests}
        self.inbox: list[Emitted] = []


class EngineClient:
    """Serves callers from one engine.

    Args:
        engine: the engine, which nobody else steps.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.RLock()
        # By request. A caller that has gone, in whatever way, leaves no entry.
        self._calls: WeakValueDictionary[str, _Call] = WeakValueDictionary()
        # Set while the engine's requests and `_calls` may differ, and while what a step brought is on its way.
        self._unsettled = self._delivering = False

    def serve(self, requests: Sequence[Request]) -> Iterator[Emitted]:
        """Serve requests to their end, together with those of other callers.

        Yields what each of them is given, as it comes. Closing the iterator aborts those that are left.

        Raises:
            ValueError: a request could never be served; none is then.
            EngineReservedError: the engine serves somebody else.
        """
        for request in requests:
            self._engine.check_fits(request)
        call = _Call(requests)
        try:
            with self._lock:
                self._prepare()
                self._unsettled = True
                for request in requests:
                    self._calls[request.request_id] = call
                    self._engine.add(request)
                self._unsettled = False
            with settled_heap():
                while call.left:
                    while call.inbox:
                        emitted = call.inbox.pop(0)
                        if emitted[2] is not None:
                            call.left.pop(emitted[0])
                        yield emitted
                    if call.left:
                        self._step(call)
        finally:
            if call.left:
                self._leave(call)

    def ask(self, question: Callable[[Engine], T]) -> T:
        """What a function of the engine returns, called between two steps."""
        with self._lock:
            return question(self._engine)

    def _step(self, call: _Call) -> None:
        """Step the engine for everybody, unless another thread did so and something came for this caller."""
        with self._lock:
            self._prepare()
            if call.inbox:
                return
            self._unsettled = self._delivering = True
            try:
                emitted = self._engine.step()
            except BaseException:
                # Nothing came that could be lost; whether the engine is torn it knows itself.
                self._delivering = False
                raise
            for each in emitted:
                self._deliver(each)
            self._unsettled = self._delivering = False

    def _leave(self, call: _Call) -> None:
        """Abort what is left of a call."""
        with self._lock:
            self._unsettled = True
            for request_id in call.left:
                self._calls.pop(request_id, None)
            if self._engine.reserved_by is None:
                self._settle()

    def _deliver(self, emitted: Emitted) -> None:
        request_id, _, whole = emitted
        caller = self._calls.get(request_id)
        if caller is not None:
            caller.inbox.append(emitted)
            if whole is not None:
                del self._calls[request_id]

    def _prepare(self) -> None:
        """Make sure that the engine can be used.

        Raises:
            EngineReservedError: the engine serves somebody else.
        """
        if self._engine.reserved_by is not None:
            raise EngineReservedError(
                f"this engine serves {self._engine.reserved_by}: send requests there, or stop it before calling this"
            )
        if self._unsettled or self._engine.torn:
            self._settle()

    def _settle(self) -> None:
        """Mend what an interruption or a caller that left has left behind.

        A torn engine begins anew. Requests that nobody waits for are aborted, and those that callers wait for and the
        engine does not know end with an error.
        """
        engine = self._engine
        if engine.torn or self._delivering:
            self._delivering = True
            for emitted in engine.reset(INTERRUPTED):
                self._deliver(emitted)
            self._delivering = False
        for request_id in engine.request_ids():
            if request_id not in self._calls:
                engine.abort(request_id)
        for request_id, caller in list(self._calls.items()):
            if not engine.knows(request_id):
                self._deliver(ended_with_error(caller.left[request_id], INTERRUPTED))
        self._unsettled = False
