"""Feeds requests to an engine as they arrive, in real or virtual time, and waits until all are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from drex.engine.engine import Emitted, Engine
from drex.request import Request


def serve(
    engine: Engine, arrivals: Iterable[tuple[float, Request]], each: Callable[[Emitted], None] | None = None
) -> None:
    """Serve requests to the end.

    Args:
        engine: that is idle.
        arrivals: (seconds from now, request), in order of time. Those at zero come as in a closed loop: as many at a
            time as the engine has seats, the next one when one is done.
        each: called with everything that is emitted.
    """
    start = engine.executor.now()
    seats = engine.scheduler.config.max_num_seqs
    coming = iter(arrivals)
    upcoming = next(coming, None)
    while upcoming is not None or engine.busy:
        now = engine.executor.now() - start
        # A request that comes at a time of its own is never held back: its clock runs from then on.
        while upcoming is not None and upcoming[0] <= now and (upcoming[0] or engine.unfinished < seats):
            engine.add(upcoming[1])
            upcoming = next(coming, None)
        if not engine.busy and upcoming is not None:
            engine.executor.wait_until(start + upcoming[0])
            continue
        for emitted in engine.step():
            if each is not None:
                each(emitted)
