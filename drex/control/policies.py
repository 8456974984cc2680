"""Which segment runs next, and which rows of a pass exit. A policy sees counts and verdicts, never requests.

`drex` rebatches by the rule of `flush`, `split` flushes at once, `art` is the paper's heuristic, and the others decide
for the whole batch, the decode rows of one pass: they exist to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drex.config import EngineConfig
from drex.control.cost import CostModel
from drex.control.flush import FlushRule, Waiting
from drex.control.plan import BoolArray, FloatArray
from drex.control.rates import ExitRates

PROBE_EVERY = 64
"""`adaptive`: while checking exits does not pay, one pass in so many checks all the same, to notice when it would."""
PROBE_WEIGHT = 8
"""Its rows count so many times for exit rates: they stand for those of all passes since the last one."""
SURE = 1.6
"""`adaptive`: where checking exits promises less than so many times full depth, what that takes is tried, first after
`PROBE` passes, then each time after twice as many, up to `PROBE_EVERY * PROBE`."""
TRIES = 4
"""Passes of such a trial: the first after others may take longer than in a row."""
PROBE = 16
"""Under run-ahead that many in a row: what they earn shows once buffers have filled and were flushed."""


class View(NamedTuple):
    """What could run now. Sequences have an entry a segment.

    Attributes:
        pass_number: of the pass to choose.
        now: time in seconds.
        ready: decoding requests that fit into a pass over segment 0.
        prompts: whether a prompt or replay has rows that fit into it.
        live: rows that wait in the buffers (0 at segment 0).
        fills: rows that their requests owe there.
        urgent: requests whose prompt, replay or first token stands there.
        oldest_age: passes that the oldest buffered row has waited.
        due: when the first buffered token is due.
        owed: decided rows that owe K/V there, of all requests.
        decoding: requests that have their first token.
        context: mean K/V entries of a request.
        ahead, lossless: whether any of the decoding requests runs ahead, and whether any does so losslessly.
        chances: how likely the next row of each of the `ready` is to be of use, descending; None: all surely are.
    """

    pass_number: int
    now: float
    ready: int
    prompts: bool
    live: Sequence[int]
    fills: Sequence[int]
    urgent: Sequence[int]
    oldest_age: Sequence[int]
    due: Sequence[float]
    owed: Sequence[int]
    decoding: int
    context: float
    ahead: bool = False
    lossless: bool = False
    chances: FloatArray | None = None


class Choice(NamedTuple):
    """The segment to run; at segment 0 how many ready rows, deeper whether rows that only owe fills come along.

    `through`: all segments at once, if nothing has to come before, with no exit checked.
    """

    segment: int
    ready: int = 0
    fills: bool = False
    through: bool = False


class Checks(NamedTuple):
    """What exit heads said of the decode rows of a pass: confidence and threshold, and whether the two mean an exit."""

    confidences: FloatArray
    thresholds: FloatArray
    exited: BoolArray


class Split:
    """Flush at once: what stands deepest goes first. With no exit points (`full`) there is nothing to choose.

    Args:
        config: of the engine.
        cost: of passes.
        kv_fill: what fills the layers that a token skipped.

    Attributes:
        checking: whether the rows of the last pass over segment 0, which may wait deeper now, were checked as a rule.
    """

    def __init__(self, config: EngineConfig, cost: CostModel, kv_fill: str) -> None:
        self.config, self.checking = config, True
        self.rates = ExitRates(cost.segments - 1)
        most = 2 * config.max_num_seqs + config.fill_rows
        self.rule = FlushRule(cost, self.rates, kv_fill, most, config.fill_rows)

    def checks_exits(self, segment: int) -> bool:
        """Whether a pass over a segment evaluates exit heads at all; asked once for each."""
        return True

    @property
    def resting(self) -> bool:
        """Whether exits are not checked for now, because that does not pay and `adaptive` lets it matter."""
        return False

    def observe(self, segment: int, rows: int, exited: int) -> None:
        """So many decode rows were checked after a segment, and exited."""
        weight = PROBE_WEIGHT if self.resting else 1
        self.rates.observe(segment, weight * rows, weight * exited)

    def choose(self, view: View) -> Choice | None:
        """The next segment, or None if nothing is ready."""
        for segment in range(len(view.live) - 1, 0, -1):
            if view.live[segment] or view.urgent[segment]:
                return Choice(segment)
        return Choice(0, view.ready) if view.ready or view.prompts else None

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        """Which decode rows of a pass exit, given what the exit head said of each, at least one."""
        return checks.exited


class Drex(Split):
    """Rebatch by the marginal-rate rule; flush what is due by age or deadline, and with whatever must run anyway."""

    def __init__(self, config: EngineConfig, cost: CostModel, kv_fill: str) -> None:
        super().__init__(config, cost, kv_fill)
        self._asked = self._went_through = 0
        self._interval, self._trying = PROBE, 0
        self._probes = self._ahead = False

    def checks_exits(self, segment: int) -> bool:
        if segment == 0:
            self._probes = self._probes_next
            self._asked += 1
            # One probe alone earns less than always checking would: under run-ahead buffers fill first.
            self.checking = not self.resting
        # What is checked before the first exit point is checked at the others too.
        return self._probes or not self.resting

    @property
    def _probes_next(self) -> bool:
        return (self._asked + 1) % PROBE_EVERY == 0

    @property
    def resting(self) -> bool:
        probing = self._ahead and self._asked % (PROBE_EVERY * PROBE) < PROBE
        return self.config.adaptive and not probing and self.rule.pays is False

    def choose(self, view: View) -> Choice | None:
        self._ahead = view.ahead
        self.rule.tick(view.pass_number, view.decoding, view.context, ahead=view.ahead, lossless=view.lossless)
        if self.resting:
            choice = super().choose(view)
            return choice if choice is None or self._probes_next else self._through(choice)
        segments = len(view.live)
        # Every buffer may come due in the same pass, and each flush takes one.
        by_age = self.config.max_wait_passes - segments
        for segment in range(segments - 1, 0, -1):
            if view.live[segment] and (view.oldest_age[segment] >= by_age or self._late_next(view, segment)):
                return Choice(segment)
        # Prompts go through at once and take the buffered rows of the segment along: the weights are read once.
        for segment in range(segments - 1, 0, -1):
            if view.urgent[segment]:
                return Choice(segment)
        if view.prompts:
            return Choice(0, view.ready)
        chosen = self.rule.choose(Waiting(view.ready, view.live, view.fills, view.chances))
        if chosen is None:
            return None
        choice = Choice(*chosen)
        if not self.config.adaptive or any(view.live):
            return choice
        if not self._trying:
            if self._asked - self._went_through < self._interval or not self.rule.might_not_pay(SURE):
                return choice
            self._interval, self._trying = min(2 * self._interval, PROBE_EVERY * PROBE), TRIES
        if any(view.owed):
            return Choice(max(range(len(view.owed)), key=lambda segment: view.owed[segment]), fills=True)
        self._trying -= 1
        return self._through(choice)

    def _through(self, choice: Choice) -> Choice:
        """All segments at once, if it begins at the first."""
        if choice.segment:
            return choice
        self._went_through = self._asked
        return choice._replace(through=True)

    def _late_next(self, view: View, segment: int) -> bool:
        """Whether the buffer's first due token could be late if another pass came before its flush.

        That pass may be the one over segment 0 or a flush of a shallower buffer; all its rows could join this one.
        Deeper buffers that are due as well go first.
        """
        due = view.due[segment]
        if due == math.inf:
            return False
        held = [s for s in range(1, len(view.live)) if s != segment and view.live[s]]
        flushes = {s: float(self.rule.seconds(s, view.live[s], view.owed[s])) for s in held}
        first = sum(seconds for s, seconds in flushes.items() if s > segment)
        between = [seconds for s, seconds in flushes.items() if s < segment]
        joined = list(view.live)
        if view.ready:
            between.append(float(self.rule.seconds(0, view.ready, 0.0)))
        joined[segment] += view.ready + sum(view.live[:segment])
        ahead = self.rule.seconds_ahead(segment, joined, view.owed)
        return view.now + first + max(between, default=0.0) + ahead > due


class Consensus(Split):
    """All rows of the batch are confident: all exit; else all stay."""

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        return np.full_like(checks.exited, checks.exited.all())


class Majority(Split):
    """The median confidence reaches the threshold: all exit; else all stay."""

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        return np.full_like(checks.exited, np.median(checks.confidences - checks.thresholds) >= 0)


class Greedy(Split):
    """Any row is confident: all exit; else all stay."""

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        return np.full_like(checks.exited, checks.exited.any())


class LatencyOnly(Greedy):
    """Any row is confident: all tokens are emitted early, and all rows run deep all the same, before the next token."""

    def choose(self, view: View) -> Choice | None:
        deeper = super().choose(view)
        owing = [segment for segment, rows in enumerate(view.owed) if rows]
        return Choice(owing[0], fills=True) if owing and (deeper is None or deeper.segment == 0) else deeper


class Art(Split):
    """The paper's adaptive rebatching threshold: arXiv 2512.15705, with the age rule of its authors' code.

    Rebatch iff more than (c / t_d) of the batch exit, c = t_s + t_d - t_f; else all go on. Flush a buffer when
    its rows · (1 + age · factor) reach the batch.
    """

    AGE_FACTOR = 0.05

    def __init__(self, config: EngineConfig, cost: CostModel, kv_fill: str) -> None:
        super().__init__(config, cost, kv_fill)
        self._go_on: set[int] = set()

    def choose(self, view: View) -> Choice | None:
        self.rule.tick(view.pass_number, view.decoding, view.context)
        for segment in range(len(view.live) - 1, 0, -1):
            grown = view.live[segment] * (1 + view.oldest_age[segment] * self.AGE_FACTOR)
            full = view.live[segment] and grown >= view.decoding
            stale = view.oldest_age[segment] >= self.config.max_wait_passes - len(view.live)
            if segment in self._go_on or view.urgent[segment] or full or (view.live[segment] and stale):
                self._go_on.discard(segment)
                if view.live[segment] or view.urgent[segment]:
                    return Choice(segment)
        if view.ready or view.prompts:
            return Choice(0, view.ready)
        return super().choose(view)

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        rows = float(len(checks.exited))
        deeper = range(segment + 1, self.rule.cost.segments)
        shallow = float(self.rule.seconds(segment, rows, 0.0))
        deep = sum(float(self.rule.seconds(s, rows, 0.0)) for s in deeper)
        # A full pass is one over all layers from here on, without the exit head.
        whole = shallow + deep - self.rule.cost.head_seconds(segment, rows)
        if checks.exited.sum() > (shallow + deep - whole) / deep * rows:
            return checks.exited
        self._go_on.add(segment + 1)
        return np.zeros_like(checks.exited)


POLICIES: dict[str, type[Split]] = {
    "drex": Drex,
    "split": Split,
    "full": Split,
    "consensus": Consensus,
    "majority": Majority,
    "greedy": Greedy,
    "latency_only": LatencyOnly,
    "art": Art,
}
