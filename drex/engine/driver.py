"""Feeds requests to an engine as they arrive, in real or virtual time, and waits until all are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from drex.control.request import Request
from drex.engine.engine import Engine
from drex.engine.heap import settled_heap
from drex.engine.samples import Emitted


def serve(
    engine: Engine,
    arrivals: Iterable[tuple[float, Request]],
    each: Callable[[Emitted], None] | None = None,
    *,
    closed: bool = False,
) -> None:
    """Serve requests to the end.

    Args:
        engine: that is idle.
        arrivals: (seconds from now, request), in order of time.
        each: called with everything that is emitted.
        closed: times don't matter: as many requests come as the engine has seats, the next one when one is done.
    """
    executor, seats = engine.executor, engine.scheduler.config.max_num_seqs
    start = executor.now()
    coming = iter(arrivals)
    upcoming = next(coming, None)
    with settled_heap():
        while upcoming is not None or engine.busy:
            now = executor.now()
            while upcoming is not None and (engine.unfinished < seats if closed else start + upcoming[0] <= now):
                # A request's clock runs from when it came, which may have been in the middle of the last pass.
                engine.add(upcoming[1], arrived=now if closed else start + upcoming[0])
                upcoming = next(coming, None)
            if not engine.busy and upcoming is not None:
                executor.wait_until(start + upcoming[0])
                continue
            for emitted in engine.step():
                if each is not None:
                    each(emitted)
