"""Feeds requests to an engine as they arrive, in real or virtual time, and waits until all are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from drex.engine.engine import Emitted, Engine
from drex.request import Request

AHEAD = 64
"""A closed loop keeps so many requests queued beyond those in flight."""


def serve(
    engine: Engine, arrivals: Iterable[tuple[float, Request]], each: Callable[[Emitted], None] | None = None
) -> None:
    """Serve requests to the end.

    Args:
        engine: that is idle.
        arrivals: (seconds from now, request), in order of time; all zeros make a closed loop over the engine's seats.
        each: called with everything that is emitted.
    """
    start = engine.executor.now()
    coming = iter(arrivals)
    upcoming = next(coming, None)
    while upcoming is not None or engine.busy:
        now = engine.executor.now() - start
        # Open arrivals are never held back: a request's time runs from when it came.
        while upcoming is not None and upcoming[0] <= now and (upcoming[0] or len(engine.scheduler.waiting) < AHEAD):
            engine.add(upcoming[1])
            upcoming = next(coming, None)
        if not engine.busy and upcoming is not None:
            engine.executor.wait_until(start + upcoming[0])
            continue
        for emitted in engine.step():
            if each is not None:
                each(emitted)
