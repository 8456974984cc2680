"""The next pass, and what became of it.

A request has no phase; at every segment it catches up with what has come there (`drex.control.seats`). Who runs is for
`drex.control.admission`, which segment runs for the policy, which rows for the selection; what these hold is claimed
and placed by `drex.control.memory.placement`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from drex.config import EngineConfig
from drex.control.admission import Admission
from drex.control.cost.model import CostModel
from drex.control.deadlines import Deadlines
from drex.control.decisions import Decisions
from drex.control.memory.arena import ArenaRows
from drex.control.memory.placement import Placement
from drex.control.memory.slots import SlotLayout, SlotPool
from drex.control.plan import NO_EVALUATIONS, IntArray, Pass, PassResult
from drex.control.policy.base import Choice, Setting, Split, View
from drex.control.policy.outlook import Solving
from drex.control.report import SchedulerReport
from drex.control.request import Request
from drex.control.results import Results
from drex.control.run_ahead.drafts import Drafts
from drex.control.seats import Seats
from drex.control.selection import Selection
from drex.control.standing import Standing
from drex.control.work import Work
from drex.extensions import POLICIES
from drex.outputs import FinishReason


class Scheduler:
    """Owns the requests through `admission`, where they stand in `seats`, and what they hold through `placement`.

    Args:
        config: sizes and policy.
        layout: of the segments.
        kv_fill: what fills the layers that a token skipped.
        cost: of passes; it learns from those that are run.
        solving: where the optimum is computed; None: in place, which holds up planning.

    Attributes:
        passes: how many were planned.
        view: what the last pass was chosen from; None where there was no choice.
        unchecked: tokens that could have exited somewhere and were not asked (`adaptive`).
    """

    def __init__(
        self,
        config: EngineConfig,
        layout: SlotLayout,
        kv_fill: str,
        cost: CostModel,
        solving: Solving | None = None,
    ) -> None:
        assert cost.segments == len(layout.lengths)
        self.config, self.layout, self.kv_fill, self.cost, self._solving = config, layout, kv_fill, cost, solving
        self.segments = len(layout.lengths)
        # The last token has a place among what is known, though it is never run.
        self.seats = Seats(config.max_num_seqs, self.segments, config.max_model_len + 1)
        self.placement = Placement(layout, kv_fill, config.kv_cache_tokens, config.arena_rows, self.seats)
        self.drafts = Drafts(self.seats, self.placement, config.max_draft)
        self.decisions = Decisions(self.seats, self.placement, self.drafts)
        self.selection = Selection(config, self.placement, self.seats, cost)
        policy: Split = POLICIES.make(config.policy, config.policy_parameters, Setting(config, cost, kv_fill, solving))
        self.deadlines = Deadlines(config.max_slowdown)
        self.admission = Admission(config, self.seats, self.placement, policy.rule)
        self.view: View | None = None
        self.passes = self.unchecked = 0
        self.results = Results(self.seats, self.placement, self.decisions, policy, cost, self.deadlines, self.admission)

    def renewed(self) -> Scheduler:
        """A scheduler without requests, for the same model and settings; of what was learnt it keeps the costs."""
        return Scheduler(self.config, self.layout, self.kv_fill, self.cost, self._solving)

    @property
    def policy(self) -> Split:
        """Which segment runs next, and which rows exit."""
        return self.results.policy

    @property
    def pool(self) -> SlotPool:
        """The K/V slots."""
        return self.placement.pool

    @property
    def arena(self) -> ArenaRows:
        """The rows of the hidden-state arena."""
        return self.placement.arena

    def report(self) -> SchedulerReport:
        """What was counted and learnt so far."""
        rule, found = self.policy.rule, self.policy.rule.outlook.yardstick
        return SchedulerReport(
            running=len(self.seats),
            waiting=len(self.admission.waiting),
            buffered=[len(buffer) for buffer in Standing.of(self.seats).buffers[1:]],
            achieved=rule.achieved,
            theta_star=found.optimal if found else None,
            ideal=found.ideal if found else None,
            full=rule.full,
            exit_rates=rule.rates.all(),
            unchecked=self.unchecked,
            run_ahead=self.drafts.report(),
            late=self.deadlines.late,
            infeasible=self.deadlines.infeasible,
            preemptions=self.admission.preemptions,
            cost_error=self.cost.error_quantiles(),
            slots_in_use=self.pool.in_use,
            slots=self.pool.capacity,
        )

    def count_afresh(self) -> None:
        """Forget what drafts came to, but for what was learnt of how likely they are right."""
        self.drafts.count_afresh()

    def gain(self, view: View) -> float | None:
        """Tokens by which flushing is worth more than going on, as solved; None where that isn't known at a view."""
        found = self.policy.rule.outlook.yardstick
        return None if found is None or view.prompts else found.gain(view.ready, view.live[1:])

    def running(self) -> list[Request]:
        """Requests that have a seat, most urgent first."""
        return self.admission.running

    def check_fits(self, request: Request) -> None:
        """Raise ValueError, naming the remedy, for a request that could never be served."""
        self.admission.check_fits(request)

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Raises ValueError for one that could never fit."""
        self.admission.add(request, now)

    def finish(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        """End a request and free all it holds; if it is in an outstanding pass, as soon as that is committed.

        Args:
            request_id: of a request that has not ended.
            reason: why it ends.
            error: what went wrong, for `FinishReason.ERROR`.
        """
        self.admission.finish(request_id, reason, error)

    # The next pass

    def next(self, now: float) -> Pass | None:
        """The next pass, or None while nothing can run (outstanding passes aside). Call `commit` with its result."""
        self.admission.admit()
        while True:
            standing = Standing.of(self.seats)
            choice = self._choose(standing, now)
            if choice is not None:
                self.passes += 1
                return self._plan(choice, standing, self.passes - 1, now)
            self.results.write_all()
            if not self.admission.preempt():
                return None

    def _choose(self, standing: Standing, now: float) -> Choice | None:
        self.view = None
        live = [len(buffer) for buffer in standing.buffers]
        urgent = [len(seats) for seats in standing.urgent]
        fit = self.selection.ready_that_fit(standing)
        prompts = self.selection.prompt_fits(standing, beside=fit)
        if not fit and not prompts and (len(standing.ready) or urgent[0]):
            # Rows for segment 0 are short of slots or arena rows: what is pending deeper makes room.
            for segment in range(self.segments - 1, 0, -1):
                if urgent[segment] or live[segment] or standing.owed[segment]:
                    return Choice(segment, fills=True)
        if sum(standing.owed) > self.config.fill_rows:
            return Choice(max(range(1, self.segments), key=lambda s: standing.owed[s]), fills=True)
        ahead, chances = bool(self.seats.having["drafting"]), None
        if ahead and np.count_nonzero((known := self.seats.chance[standing.ready]) < 1):
            chances = np.sort(known)[::-1][:fit]
        self.view = View(
            pass_number=self.passes,
            now=now,
            ready=fit,
            chances=chances,
            prompts=prompts,
            live=live,
            fills=[standing.fills(segment) for segment in range(self.segments)],
            urgent=urgent,
            oldest_age=[self.passes - _least(self.seats.since, waiting, self.passes) for waiting in standing.buffers],
            due=self._due(standing),
            owed=standing.owed,
            decoding=self.seats.decoding,
            context=self.results.context,
            ahead=ahead,
            lossless=bool(self.seats.having["lossless"]),
        )
        return self.policy.choose(self.view)

    def _due(self, standing: Standing) -> list[float]:
        """When the first token of each buffer is due."""
        if not self.results.anyone_due:
            return [np.inf] * self.segments
        return [_least(self.seats.due, waiting, np.inf) for waiting in standing.buffers]

    def _plan(self, choice: Choice, standing: Standing, number: int, now: float) -> Pass:
        segment, seats = choice.segment, self.seats
        checking = self.policy.checks_exits(segment)
        spans, counts = self.selection.pick(choice, standing, now)
        assert len(spans), f"policy {self.config.policy!r} chose segment {segment}, where nothing waits"
        starts = seats.reached[segment + 1][spans]
        stops = starts + counts
        last = self.segments - 1 if choice.through and self._goes_through(spans, starts, stops) else segment
        placed = self.placement.place_each(segment, last, spans, starts, stops)
        asked = self.decisions.ask(last, spans, placed[-1], checking=checking)
        self.unchecked += asked.unasked if last == segment else self.decisions.could_exit(asked)
        seats.hold(spans)
        live, fills = len(spans), 0
        if seats.catching_up:
            decoding = seats.decodes[spans]
            live = int(np.count_nonzero(decoding))
            fills = int(counts[decoding].sum()) - live
        earning = last == segment and self.policy.checking
        self.results.expect(number, Work(spans, live, len(spans) - live, fills, last, placed[-1], asked, earning))
        then = None
        for each in range(last, segment - 1, -1):
            rows = placed[each - segment]
            then = Pass(
                number=number,
                segment=each,
                starts=starts,
                stops=stops,
                sizes=rows.sizes,
                full=rows.full,
                visible=rows.visible,
                tokens=seats.token.take(rows.places) if each == 0 else starts[:0],
                fill=rows.fill,
                context=rows.context,
                evaluations=asked.evaluations if each == last else NO_EVALUATIONS,
                then=then,
            )
        assert then is not None
        return then

    def _goes_through(self, spans: IntArray, starts: IntArray, stops: IntArray) -> bool:
        """Whether a pass can run all segments: exits of a scored prompt are asked, whatever else is not."""
        seats = self.seats
        scored = seats.having["scored"] and (seats.scored[spans] & (starts < seats.prompt[spans] - 1)).any()
        return not scored and self.placement.goes_through(spans, starts, stops)

    # What a pass brought

    def commit(self, done: Pass, result: PassResult, now: float) -> None:
        """Take in a result: frontiers move, and who is done leaves. The next pass may be planned before `record`."""
        self.results.commit(done, result, self.passes, now)

    def record(self, done: Pass) -> list[Request]:
        """Write what a committed pass decided into the requests. Returns those that got a token or ended."""
        return self.results.record(done)

    def forget(self, done: Pass) -> list[Request]:
        """As `record`, of a committed pass that nothing is to be learnt from: `took` is not called."""
        return self.results.forget(done)

    def took(self, done: Pass, seconds: float) -> None:
        """Learn how long a committed pass took, the engine's own time included."""
        self.results.took(done, seconds, self.passes)

    def work(self, done: Pass) -> Work:
        """What a pass that `took` was not yet told of did."""
        return self.results.work(done)

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots and arena rows agree with the requests that run."""
        self.placement.check_integrity()


def _least(column: npt.NDArray[Any], seats: IntArray, default: float) -> Any:
    """The smallest entry of some seats."""
    return min(column[seats].tolist(), default=default)
