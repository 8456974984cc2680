"""Executors in place of a model: passes take what a cost model or a record says; exits are drawn or given.

No torch. Time is virtual: it moves when a pass is collected, or when there is nothing to do until the next arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from drex.control.cost.model import CostModel, Load
from drex.control.hashing import mix, uniform
from drex.control.plan import BoolArray, Evaluations, FloatArray, Pass, PassResult, Verdicts
from drex.control.policy.outlook import Pending, Solving
from drex.control.policy.yardstick import Yardstick
from drex.engine.executor import Executor

RIGHT = 1
"""Sets the numbers that say whether a token is right apart from its confidence's."""
TOKEN, WRONG = 0, 1
"""What full depth says, and what an exit point says that is wrong."""


class Said(NamedTuple):
    """What an exit point says of rows: its confidence, and whether its token is the one that full depth says."""

    confidences: FloatArray
    right: BoolArray


ExitSource = Callable[[int, Evaluations], Said]
"""At which segment, of which rows -> what is said of each."""


class DrawnExits:
    """Confidences uniform by request seed, position and exit, so that 1 - threshold of the rows exit.

    They are those of the criterion `trace`.

    Args:
        acceptance: share of the tokens that are right, whatever the confidence.
    """

    def __init__(self, acceptance: float = 1.0) -> None:
        self._acceptance = acceptance

    def __call__(self, segment: int, asked: Evaluations) -> Said:
        seeds, samples = [draws.seed for draws in asked.draws], [draws.sample for draws in asked.draws]
        where = seeds, samples, asked.positions, segment
        return Said(uniform(*where), uniform(*where, RIGHT) < self._acceptance)


class RecordedExits:
    """Exits as they were: confidence 1 where the token was emitted, 0 before. All tokens are right.

    Args:
        depths: for each request, the segments that each output token executed; a longer output starts again.
    """

    def __init__(self, depths: Mapping[str, Sequence[int]]) -> None:
        self._depths = depths

    def __call__(self, segment: int, asked: Evaluations) -> Said:
        out = np.zeros(len(asked))
        for row, (draws, position) in enumerate(zip(asked.draws, asked.positions.tolist(), strict=True)):
            recorded = self._depths[draws.request_id]
            number = position - draws.prompt_length + 1
            out[row] = recorded[number % len(recorded)] <= segment + 1
        return Said(out, np.ones(len(asked), dtype=np.bool_))


class RecordedConfidences:
    """Confidences as they were on some text, and whether the tokens were right: requests start somewhere in it.

    Args:
        confidences, right: of each exit point at each position of the text. Shape (exits, positions).
    """

    def __init__(self, confidences: FloatArray, right: BoolArray) -> None:
        self._confidences, self._right = confidences, right

    def __call__(self, segment: int, asked: Evaluations) -> Said:
        starts = mix([draws.seed for draws in asked.draws], [draws.sample for draws in asked.draws])
        length = self._confidences.shape[1]
        where = ((starts % np.uint64(length)).astype(np.int64) + asked.positions) % length
        return Said(self._confidences[segment, where], self._right[segment, where])


def verdicts(said: Said | None, asked: Evaluations) -> Verdicts:
    """Verdicts that say so; None is the final head, which is always right."""
    count = len(asked)
    if said is None:
        said = Said(np.ones(count), np.ones(count, dtype=np.bool_))
    tokens = np.where(said.right, TOKEN, WRONG)
    exited = said.confidences >= asked.thresholds
    agreeing, finite = np.stack((tokens, np.ones_like(tokens))), np.ones(count, dtype=np.bool_)
    return Verdicts(tokens, np.zeros(count), said.confidences, exited, agreeing, {}, finite)


class VirtualExecutor:
    """Runs no model.

    Args:
        cost: what passes take.
        exits: what exit points say; None: as `DrawnExits` does.
    """

    asynchronous = False

    def __init__(self, cost: CostModel, exits: ExitSource | None = None) -> None:
        self._cost, self._exits = cost, exits or DrawnExits()
        self._clock = 0.0
        self._submitted: deque[Pass] = deque()

    def now(self) -> float:
        return self._clock

    def wait_until(self, moment: float) -> None:
        self._clock = max(self._clock, moment)

    def submit(self, batch: Pass) -> None:
        self._submitted.append(batch)

    def collect(self) -> PassResult:
        *_, last = parts = self._submitted.popleft().parts
        self._clock += self._cost.predict_parts([(part.segment, Load.of(part)) for part in parts])
        final = last.segment == self._cost.segments - 1
        said = None if final else self._exits(last.segment, last.evaluations)
        return PassResult(verdicts(said, last.evaluations))

    def abandon(self) -> None:
        self._submitted.clear()


class Recorder:
    """Passes everything on to an executor, and notes what it said: times, in the order asked, and results.

    Args:
        inner: the executor that runs.
    """

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.asynchronous = inner.asynchronous
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

    def abandon(self) -> None:
        self.inner.abandon()


class Replay:
    """Says again what a recorder noted: an engine that is given the same requests makes the same passes.

    Args:
        recorded: of the run to replay.
    """

    def __init__(self, recorded: Recorder) -> None:
        self.asynchronous = recorded.asynchronous
        self._times, self._results = deque(recorded.times), deque(recorded.results)

    def now(self) -> float:
        return self._times.popleft()

    def wait_until(self, moment: float) -> None:
        """Time goes as it went."""

    def submit(self, batch: Pass) -> None:
        """The result is known."""

    def collect(self) -> PassResult:
        return self._results.popleft()

    def abandon(self) -> None:
        """Nothing runs."""


class RecordedSolving:
    """Passes yardsticks on to where they are solved, and notes at which passes they were there.

    Args:
        inner: where they are solved.
    """

    def __init__(self, inner: Solving) -> None:
        self.inner = inner
        self.passes: list[int] = []

    def submit(self, solve: Callable[[], Yardstick]) -> Pending:
        return _Noted(self.inner.submit(solve), self.passes)


class _Noted(NamedTuple):
    inner: Pending
    passes: list[int]

    def at(self, pass_number: int) -> Yardstick | None:
        found = self.inner.at(pass_number)
        if found is not None:
            self.passes.append(pass_number)
        return found


class ReplayedSolving:
    """Solves again what `RecordedSolving` noted, each yardstick to be used at the same pass.

    Args:
        recorded: of the run to replay.
    """

    def __init__(self, recorded: RecordedSolving) -> None:
        self._passes = deque(recorded.passes)

    def submit(self, solve: Callable[[], Yardstick]) -> Pending:
        return _From(self._passes.popleft() if self._passes else None, solve())


class _From(NamedTuple):
    """A yardstick that is there from a pass on; None: never."""

    pass_number: int | None
    yardstick: Yardstick

    def at(self, pass_number: int) -> Yardstick | None:
        return self.yardstick if self.pass_number is not None and pass_number >= self.pass_number else None
