"""An executor that runs every pass on the model, and says of its exit points what a source says instead.

For benchmarks on random weights: what a pass costs is real, whose confidence is high is chosen.
"""

from __future__ import annotations

from collections import deque

from drex.control.plan import Pass, PassResult
from drex.engine.executor import Executor
from drex.sim.executor import ExitSource, verdicts


class Traced:
    """Runs passes on another executor.

    Args:
        inner: that runs them.
        exits: what exit points say.
        segments: of the model.
    """

    def __init__(self, inner: Executor, exits: ExitSource, segments: int) -> None:
        self.inner, self._exits, self._segments = inner, exits, segments
        self.asynchronous = inner.asynchronous
        self._submitted: deque[Pass] = deque()

    def now(self) -> float:
        return self.inner.now()

    def wait_until(self, moment: float) -> None:
        self.inner.wait_until(moment)

    def submit(self, batch: Pass) -> None:
        self._submitted.append(batch)
        self.inner.submit(batch)

    def collect(self) -> PassResult:
        last, result = self._submitted.popleft().parts[-1], self.inner.collect()
        if result.verdicts is None:
            return result
        final = last.segment == self._segments - 1
        said = None if final else self._exits(last.segment, last.evaluations)
        return PassResult(verdicts(said, last.evaluations))

    def abandon(self) -> None:
        self._submitted.clear()
        self.inner.abandon()
