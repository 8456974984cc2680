"""Executors in place of a model: passes take what a cost model or a record says; exits are drawn or given.

No torch. Time is virtual: it moves when a pass is collected, or when there is nothing to do until the next arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from drex.control.cost import CostModel, Load
from drex.control.hashing import uniform
from drex.control.plan import Evaluation, Pass, PassResult, Verdict
from drex.engine.executor import Executor

ExitSource = Callable[[str, int, Evaluation], float]
"""Request id, segment and evaluation -> confidence."""
TOKEN = 0


def drawn_exits(request_id: str, segment: int, evaluation: Evaluation) -> float:
    """Uniform by request seed, position and exit: the criterion `trace`, with which 1 - threshold of the rows exit."""
    draws = evaluation.draws
    return uniform(draws.seed, draws.sample, evaluation.position, segment)


class RecordedExits:
    """Exits as they were: confidence 1 where the token was emitted, 0 before.

    Args:
        depths: for each request, the segments that each output token executed; a longer output starts again.
    """

    def __init__(self, depths: Mapping[str, Sequence[int]]) -> None:
        self._depths = depths

    def __call__(self, request_id: str, segment: int, evaluation: Evaluation) -> float:
        recorded = self._depths[request_id]
        number = evaluation.position - evaluation.draws.prompt_length + 1
        return 1.0 if recorded[number % len(recorded)] <= segment + 1 else 0.0


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
        return PassResult(
            [[self._verdict(span.request_id, batch.segment, e) for e in span.evaluations] for span in batch.spans]
        )

    def _verdict(self, request_id: str, segment: int, evaluation: Evaluation) -> Verdict:
        if evaluation.threshold is None:
            return Verdict(TOKEN, 0.0, 1.0, False, (TOKEN, 1), ())
        confidence = self._exits(request_id, segment, evaluation)
        return Verdict(TOKEN, 0.0, confidence, confidence >= evaluation.threshold, (TOKEN, 1), ())


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
