"""An executor that runs every pass on the model, and says of its exit points what a source says instead.

For benchmarks on random weights: what a pass costs is real, whose confidence is high is chosen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from drex.control.plan import Evaluations, Pass, PassResult
from drex.engine.executor import Executor
from drex.sim.executor import ExitSource


class Traced:
    """Runs passes on another executor.

    Args:
        inner: that runs them.
        exits: what exit points say.
    """

    def __init__(self, inner: Executor, exits: ExitSource) -> None:
        self.inner, self._exits = inner, exits
        self._submitted: deque[tuple[int, Evaluations]] = deque()

    def now(self) -> float:
        return self.inner.now()

    def wait_until(self, moment: float) -> None:
        self.inner.wait_until(moment)

    def submit(self, batch: Pass) -> None:
        self._submitted.append((batch.segment, batch.evaluations))
        self.inner.submit(batch)

    def collect(self) -> PassResult:
        segment, asked = self._submitted.popleft()
        result = self.inner.collect()
        if result.verdicts is None or np.isnan(asked.thresholds).all():
            return result
        said = self._exits(segment, asked)
        return PassResult(replace(result.verdicts, confidences=said, exited=said >= asked.thresholds))
