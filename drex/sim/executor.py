"""Executors in place of a model: passes take what a cost model or a record says; exits are drawn or given.

No torch. Time is virtual: it moves when a pass is collected, or when there is nothing to do until the next arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from drex.control.cost import CostModel, Load
from drex.control.hashing import uniform
from drex.control.plan import Evaluations, FloatArray, Pass, PassResult, Verdicts
from drex.engine.executor import Executor

ExitSource = Callable[[int, Evaluations], FloatArray]
"""At which segment, of which rows -> confidence of each."""
TOKEN = 0


def drawn_exits(segment: int, asked: Evaluations) -> FloatArray:
    """Uniform by request seed, position and exit: the criterion `trace`, with which 1 - threshold of the rows exit."""
    seeds, samples = [draws.seed for draws in asked.draws], [draws.sample for draws in asked.draws]
    return uniform(seeds, samples, asked.positions, segment)


class RecordedExits:
    """Exits as they were: confidence 1 where the token was emitted, 0 before.

    Args:
        depths: for each request, the segments that each output token executed; a longer output starts again.
    """

    def __init__(self, depths: Mapping[str, Sequence[int]]) -> None:
        self._depths = depths

    def __call__(self, segment: int, asked: Evaluations) -> FloatArray:
        out = np.zeros(len(asked))
        for row, (draws, position) in enumerate(zip(asked.draws, asked.positions.tolist(), strict=True)):
            recorded = self._depths[draws.request_id]
            number = position - draws.prompt_length + 1
            out[row] = recorded[number % len(recorded)] <= segment + 1
        return out


class VirtualExecutor:
    """Runs no model.

    Args:
        cost: what passes take.
        exits: what exit points say.
    """

    def __init__(self, cost: CostModel, exits: ExitSource = drawn_exits) -> None:
        self._cost, self._exits = cost, exits
        self._clock = 0.0
        self._submitted: deque[Pass] = deque()

    def now(self) -> float:
        return self._clock

    def wait_until(self, moment: float) -> None:
        self._clock = max(self._clock, moment)

    def submit(self, batch: Pass) -> None:
        self._submitted.append(batch)

    def collect(self) -> PassResult:
        batch = self._submitted.popleft()
        self._clock += self._cost.predict(batch.segment, Load.of(batch))
        return PassResult(self._judge(batch))

    def _judge(self, batch: Pass) -> Verdicts:
        asked, segment = batch.evaluations, batch.segment
        confidences = np.ones(len(asked))
        if not np.isnan(asked.thresholds).all():
            confidences = self._exits(segment, asked)
        same = np.full(len(asked), TOKEN)
        agreeing = np.stack((same, np.ones_like(same)))
        return Verdicts(same, np.zeros(len(asked)), confidences, confidences >= asked.thresholds, agreeing, {})


class Recorder:
    """Passes everything on to an executor, and notes what it said: times, in the order asked, and results.

    Args:
        inner: the executor that runs.
    """

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.times: list[float] = []
        self.results: list[PassResult] = []

    def now(self) -> float:
        self.times.append(self.inner.now())
        return self.times[-1]

    def wait_until(self, moment: float) -> None:
        self.inner.wait_until(moment)

    def submit(self, batch: Pass) -> None:
        self.inner.submit(batch)

    def collect(self) -> PassResult:
        self.results.append(self.inner.collect())
        return self.results[-1]


class Replay:
    """Says again what a recorder noted: an engine that is given the same requests makes the same passes.

    Args:
        recorded: of the run to replay.
    """

    def __init__(self, recorded: Recorder) -> None:
        self._times, self._results = deque(recorded.times), deque(recorded.results)

    def now(self) -> float:
        return self._times.popleft()

    def wait_until(self, moment: float) -> None:
        """Time goes as it went."""

    def submit(self, batch: Pass) -> None:
        """The result is known."""

    def collect(self) -> PassResult:
        return self._results.popleft()
