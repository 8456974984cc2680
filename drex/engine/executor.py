"""Executors run passes and own time. The engine talks to them through `submit` and `collect` only."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from drex.compute.segments import SegmentRunner
from drex.control.plan import Pass, PassResult

log = logging.getLogger(__name__)


class Executor(Protocol):
    """Runs passes in the order in which they were submitted."""

    def now(self) -> float:
        """The time, in seconds from some start."""

    def submit(self, batch: Pass) -> None:
        """Start a pass."""

    def collect(self) -> PassResult:
        """Wait for the oldest pass that was submitted and not yet collected."""


class TorchExecutor:
    """Runs each pass at once, in this thread. A pass that fails gives a result with its error, not an exception."""

    def __init__(self, runner: SegmentRunner) -> None:
        self.runner = runner
        self._results: list[PassResult] = []

    def now(self) -> float:
        return time.perf_counter()

    def submit(self, batch: Pass) -> None:
        try:
            result = PassResult(self.runner.run(batch))
        except Exception as error:  # whatever it is, the requests of this pass must get an answer
            log.exception("pass %d over segment %d failed", batch.number, batch.segment)
            result = PassResult((), error)
        self._results.append(result)

    def collect(self) -> PassResult:
        return self._results.pop(0)
