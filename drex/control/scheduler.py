"""The next pass, and what became of it.

A request has no phase; at every segment it catches up with what has come there (`drex.control.seats`). Who runs is for
`drex.control.admission`, which segment runs for the policy, which rows for the selection; what these hold is claimed
and placed by `drex.control.placement`.
"""

from __future__ import annotations

from operator import contains
from typing import Any

import numpy as np
import numpy.typing as npt

from drex.config import EngineConfig
from drex.control.admission import Admission
from drex.control.arena import ArenaRows
from drex.control.cost import CostModel, Load
from drex.control.deadlines import Deadlines
from drex.control.decisions import Asked, Decisions
from drex.control.drafts import Drafts
from drex.control.placement import Placement
from drex.control.plan import NO_EVALUATIONS, BoolArray, IntArray, Pass, PassResult, Verdicts, total
from drex.control.policies import POLICIES, Checks, Choice, View
from drex.control.records import Decided
from drex.control.seats import Seats
from drex.control.selection import Selection
from drex.control.slots import SlotLayout, SlotPool
from drex.control.standing import Standing
from drex.control.work import Work
from drex.request import FinishReason, Request


class Scheduler:
    """Owns the requests through `admission`, where they stand in `seats`, and what they hold through `placement`.

    Args:
        config: with `kv_cache_tokens` resolved.
        layout: of the segments.
        kv_fill: what fills the layers that a token skipped.
        cost: of passes; it learns from those that are run.

    Attributes:
        passes: how many were planned.
        view: what the last pass was chosen from; None where there was no choice.
        unchecked: tokens that could have exited somewhere and were not asked (`adaptive`).
    """

    def __init__(self, config: EngineConfig, layout: SlotLayout, kv_fill: str, cost: CostModel) -> None:
        assert config.kv_cache_tokens is not None
        assert cost.segments == len(layout.lengths)
        self.config, self.layout, self.kv_fill, self.cost = config, layout, kv_fill, cost
        self.segments = len(layout.lengths)
        # The last token has a place among what is known, though it is never run.
        self.seats = Seats(config.max_num_seqs, self.segments, config.max_model_len + 1)
        self.placement = Placement(layout, kv_fill, config.kv_cache_tokens, config.arena_rows, self.seats)
        self.drafts = Drafts(self.seats, self.placement, config.max_draft)
        self.decisions = Decisions(self.seats, self.placement, self.drafts)
        self.selection = Selection(config, self.placement, self.seats, cost)
        self.policy = POLICIES[config.policy](config, cost, kv_fill)
        self.deadlines = Deadlines(config.max_slowdown)
        self.admission = Admission(config, self.seats, self.placement, self.policy.rule)
        self.view: View | None = None
        self.passes = self.unchecked = 0
        self._outstanding: dict[int, Work] = {}
        self._context = 0.0

    def renewed(self) -> Scheduler:
        """A scheduler without requests, for the same model and settings; of what was learnt it keeps the costs."""
        return Scheduler(self.config, self.layout, self.kv_fill, self.cost)

    @property
    def pool(self) -> SlotPool:
        """The K/V slots."""
        return self.placement.pool

    @property
    def arena(self) -> ArenaRows:
        """The rows of the hidden-state arena."""
        return self.placement.arena

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
            for work in self._outstanding.values():
                self._write(work)
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
            context=self._context,
            ahead=ahead,
            lossless=bool(self.seats.having["lossless"]),
        )
        return self.policy.choose(self.view)

    def _due(self, standing: Standing) -> list[float]:
        """When the first token of each buffer is due."""
        if not self._anyone_due:
            return [np.inf] * self.segments
        return [_least(self.seats.due, waiting, np.inf) for waiting in standing.buffers]

    @property
    def _anyone_due(self) -> bool:
        """Whether any running request can have due times."""
        return self.deadlines.max_slowdown is not None or self.seats.having["paced"] > 0

    def _plan(self, choice: Choice, standing: Standing, number: int, now: float) -> Pass:
        segment, seats = choice.segment, self.seats
        checking = self.policy.checks_exits(segment)
        spans, counts = self.selection.pick(choice, standing, now)
        assert len(spans)
        starts = seats.reached[segment + 1][spans]
        stops = starts + counts
        last = self.segments - 1 if choice.through and self._goes_through(spans, starts, stops) else segment
        placed = self.placement.place_each(segment, last, spans, starts, stops)
        asked = self.decisions.ask(last, spans, placed[-1], checking=checking)
        self.unchecked += asked.unasked if last == segment else self.decisions.could_exit(asked)
        seats.idle[spans] = False
        live, fills = len(spans), 0
        if seats.catching_up:
            decoding = seats.decodes[spans]
            live = int(np.count_nonzero(decoding))
            fills = int(counts[decoding].sum()) - live
        earning = last == segment and self.policy.checking
        self._outstanding[number] = Work(spans, live, len(spans) - live, fills, last, placed[-1], asked, earning)
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
        work, seats = self._outstanding[done.number], self.seats
        seats.idle[work.spans] = True
        if result.verdicts is None:
            self._fail(work, seats.requests[work.spans].tolist(), f"{type(result.error).__name__}: {result.error}")
        elif np.count_nonzero(result.verdicts.finite) == len(result.verdicts):
            self._advance(done, work, result.verdicts, now)
        else:
            self._advance_finite(done, work, result.verdicts, now)
        if aborted := self.admission.finish_aborted():
            work.touched += [each for each in aborted if each not in work.touched]

    def _fail(self, work: Work, requests: list[Request], error: str) -> None:
        """End requests of a committed pass with an error, but for those that it ended or that were to be aborted."""
        for request in requests:
            if request.finish_reason is None:
                reason = request.abort_asked or FinishReason.ERROR
                self.finish(request.request_id, reason, error if reason is FinishReason.ERROR else None)
        work.touched += [each for each in requests if each not in work.touched]

    def _advance_finite(self, done: Pass, work: Work, verdicts: Verdicts, now: float) -> None:
        """As `_advance`, of a pass some of whose logits are NaN or infinite: these requests end with an error."""
        broken = dict.fromkeys(self.seats.requests[work.asked.seats[~verdicts.finite]].tolist())
        work.asked = work.asked.kept(verdicts.finite)
        self._advance(done, work, verdicts.kept(verdicts.finite), now)
        layers = sum(self.layout.lengths[: work.last + 1])
        self._fail(
            work,
            list(broken),
            f"the logits after layer {layers} are NaN or infinite: the weights are broken, or the dtype can't hold "
            "what the model computes (float16 often can't: try bfloat16 or float32)",
        )

    def record(self, done: Pass) -> list[Request]:
        """Write what a committed pass decided into the requests. Returns those that got a token or ended."""
        work = self._outstanding[done.number]
        self._write(work)
        return work.touched

    def forget(self, done: Pass) -> list[Request]:
        """As `record`, of a committed pass that nothing is to be learnt from: `took` is not called."""
        touched = self.record(done)
        del self._outstanding[done.number]
        return touched

    def _write(self, work: Work) -> None:
        """Write it, unless that is done."""
        if work.unwritten is not None:
            self.decisions.record(work.unwritten)
            work.unwritten = None

    def _advance(self, done: Pass, work: Work, verdicts: Verdicts, now: float) -> None:
        """Rows have passed a segment: they are decided, or wait for the next one."""
        seats, segment, asked = self.seats, work.last, work.asked
        settled = seats.settled[asked.arrived]
        for each in range(done.segment, segment + 1):
            seats.reached[each + 1][work.spans] = done.stops
        self.placement.passed(segment, work.placed)
        decided, written = self.decisions.take_in(segment, asked, verdicts, self._exits(segment, asked, verdicts))
        self.placement.skip_ahead(work.spans)
        seats.since[asked.arrived] = self.passes
        if work.prompts:
            seats.caught_up(work.spans)
        if segment + 1 < self.segments and self._anyone_due:
            undecided = asked.arrived[seats.settled[asked.arrived] == settled]
            if np.isfinite(seats.due[undecided]).any():
                self._late_already(undecided, segment + 1, now)
        work.unwritten = decided
        self._emit(decided, written, work, now)

    def _exits(self, segment: int, asked: Asked, verdicts: Verdicts) -> BoolArray:
        """Which evaluated rows exit: of the live rows those that the policy lets, of the scored ones all that can."""
        live = slice(asked.live)
        if segment == self.segments - 1 or not asked.live:
            return verdicts.exited
        said = Checks(verdicts.confidences[live], asked.evaluations.thresholds[live], verdicts.exited[live])
        allowed = self.policy.exits(segment, said)
        self.policy.observe(segment, asked.live, int(np.count_nonzero(allowed)))
        all_live = asked.live == len(verdicts)
        return allowed if all_live else np.concatenate((allowed, verdicts.exited[asked.live :]))

    def _late_already(self, spans: IntArray, segment: int, now: float) -> None:
        """Live rows have come to a buffer: count those whose tokens can't be in time any more."""
        standing = Standing.of(self.seats)
        live, fills = [len(b) for b in standing.buffers], [standing.fills(s) for s in range(self.segments)]
        ahead = self.policy.rule.seconds_ahead(segment, live, fills)
        self.deadlines.buffered(self.seats.due[spans], now, ahead)

    def _emit(self, decided: Decided, written: list[tuple[Request, int]], work: Work, now: float) -> None:
        """Requests got tokens: they set when the next is due, and may be the last."""
        seats, live = self.seats, decided.live
        rows, first, anyone_due = [], 0, self._anyone_due
        if live:
            of, tokens = decided.seats[:live], decided.tokens[:live]
            counts = decided.positions[:live] + 2 - seats.prompt[of]
            # Most have no target, and go on.
            notable = counts >= seats.most[of]
            if work.prompts:
                firsts = counts == 1
                first = int(np.count_nonzero(firsts))
                notable |= firsts
            if anyone_due:
                notable |= self.deadlines.bounds(seats.paced[of])
            might_end = list(map(contains, seats.ends[of].tolist(), tokens))
            if True in might_end:
                notable |= might_end
            rows = notable.nonzero()[0].tolist()
        full_step = self.policy.rule.full_step(seats.decoding) if rows or written else 0.0
        for row in rows:
            self._emitted(decided.requests[row], tokens[row], int(counts[row]), now, full_step)
        for request, _ in written:
            token, number = request.tokens[-1], len(request.records)
            most = request.params.max_tokens
            if anyone_due or request.abort_asked is not None or number >= most or request.ends(token, number):
                self._emitted(request, token, number, now, full_step)
        work.touched = [*decided.requests[:live], *(request for request, _ in written)]
        # The first token of a request comes from its prompt; what stands on others never is the first.
        work.decided = live - first + sum(count for _, count in written)

    def _emitted(self, request: Request, token: int, number: int, now: float, full_step: float) -> None:
        """A request's token came, output `number`, perhaps after others."""
        self.deadlines.emitted(request, number, now, full_step)
        self.seats.due[request.seat] = request.due
        reason = request.abort_asked or request.ending(token, number)
        if reason is not None:
            self.finish(request.request_id, reason)

    def took(self, done: Pass, seconds: float) -> None:
        """Learn how long a committed pass took, the engine's own time included."""
        load, work, rule = Load.of(done.last), self._outstanding.pop(done.number), self.policy.rule
        if done.then is None:
            self.cost.observe(done.segment, load, seconds)
        else:
            self.cost.observe_through(load, seconds)
        if not work.prompts:
            rule.observe(work.decided, seconds, checked=work.checking)
            if done.segment == 0:
                lengths = load.entries if done.then is None else total(done.context.lengths)
                self._context = lengths / done.spans
        elif work.live:
            # Prompts came along: the decode rows' share is what they would have taken alone.
            alone = (
                float(rule.seconds(done.segment, work.live, work.fills))
                if done.then is None
                else rule.full_step(work.live)
            )
            rule.observe(work.decided, alone, checked=work.checking)
        rule.prepare(self.passes, self._context)

    def work(self, done: Pass) -> Work:
        """What a pass that `took` was not yet told of did."""
        return self._outstanding[done.number]

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots and arena rows agree with the requests that run."""
        self.placement.check_integrity()


def _least(column: npt.NDArray[Any], seats: IntArray, default: float) -> Any:
    """The smallest entry of some seats."""
    return min(column[seats].tolist(), default=default)
