"""One policy at one count of requests in flight, and what its passes measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from drex.control.request import Request
from drex.engine.driver import serve
from drex.engine.engine import Engine, EngineStats
from drex.engine.metrics import Metrics, PassRecord
from drex.engine.samples import Emitted

Arrivals = Iterable[tuple[float, Request]]
"""Requests with their times of arrival, in seconds."""


def nothing() -> None:
    """Nobody wants to know."""


@dataclass
class Cell:
    """One policy at one count of requests in flight, over all repetitions.

    Attributes:
        closed: whether requests come as others end, or at times of their own.
        engine: idle between repetitions; its cost model goes on learning.
        speeds: output tokens a second, prompts included in the time, one a repetition.
        history: passes of all repetitions.
        prompts, outputs: token ids of the last repetition, by request id.
    """

    policy: str
    in_flight: int
    engine: Engine
    closed: bool = True
    speeds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    history: list[PassRecord] = field(default_factory=list)
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)

    @property
    def metrics(self) -> Metrics:
        return self.engine.metrics

    def warm_up(self, arrivals: Arrivals, done: Callable[[], None] = nothing) -> None:
        """A run that counts for nothing but what the cost model and the exit rates learn; `done` as for `run`."""
        serve(self.engine, arrivals, lambda emitted: done() if emitted[2] is not None else None, closed=True)
        self.engine.metrics, self.engine.stats = Metrics(), EngineStats()
        self.engine.scheduler.count_afresh()

    def run(self, arrivals: Arrivals, done: Callable[[], None] = nothing) -> None:
        """One repetition; `done` is called after each request."""
        arrivals = list(arrivals)
        self.prompts = {request.request_id: request.prompt for _, request in arrivals}
        gc.collect()
        outputs: dict[str, list[int]] = {}

        def each(emitted: Emitted) -> None:
            if emitted[2] is not None:
                outputs[emitted[0]] = emitted[2].token_ids
                done()

        self.engine.history = []
        before, started = self.metrics.tokens, self.engine.executor.now()
        serve(self.engine, arrivals, each, closed=self.closed)
        seconds = self.engine.executor.now() - started
        self.speeds.append((self.metrics.tokens - before) / seconds)
        self.seconds += seconds
        self.history.extend(self.engine.history)
        self.outputs = outputs
