"""What became of a pass: frontiers move, requests get tokens and end, and costs and earnings are learnt."""

from __future__ import annotations

from operator import contains

import numpy as np

from drex.control.admission import Admission
from drex.control.cost.model import CostModel, Load
from drex.control.deadlines import Deadlines
from drex.control.decisions import Asked, Decisions
from drex.control.memory.placement import Placement
from drex.control.plan import BoolArray, IntArray, Pass, PassResult, Verdicts, total
from drex.control.policy.base import Checks, Split
from drex.control.records import Decided
from drex.control.request import Request
from drex.control.seats import Seats
from drex.control.standing import Standing
from drex.control.work import Work
from drex.outputs import FinishReason


class Results:
    """Takes in results of passes.

    Args:
        seats: of the requests that run.
        placement: what these hold.
        decisions: what becomes of evaluated rows.
        policy: which of them exit; it learns what passes earn.
        cost: of passes; it learns what they took.
        deadlines: when tokens are due.
        admission: where requests end.

    Attributes:
        context: mean K/V entries of a decoding request, as of the last pass over segment 0.
    """

    def __init__(
        self,
        seats: Seats,
        placement: Placement,
        decisions: Decisions,
        policy: Split,
        cost: CostModel,
        deadlines: Deadlines,
        admission: Admission,
    ) -> None:
        self.seats, self.placement, self.decisions, self.policy = seats, placement, decisions, policy
        self.cost, self.deadlines, self.admission = cost, deadlines, admission
        self.segments, self.context = seats.segments, 0.0
        self._outstanding: dict[int, Work] = {}

    def expect(self, number: int, work: Work) -> None:
        """A pass was planned."""
        self._outstanding[number] = work

    def write_all(self) -> None:
        """Write what committed passes decided into the requests."""
        for work in self._outstanding.values():
            self._write(work)

    @property
    def anyone_due(self) -> bool:
        """Whether any running request can have due times."""
        return self.deadlines.max_slowdown is not None or self.seats.having["paced"] > 0

    def commit(self, done: Pass, result: PassResult, passes: int, now: float) -> None:
        """Take in a result: frontiers move, and who is done leaves. The next pass may be planned before `record`.

        Args:
            done: the pass.
            result: of it.
            passes: how many were planned.
            now: time in seconds.
        """
        work, seats = self._outstanding[done.number], self.seats
        seats.release(work.spans)
        if result.verdicts is None:
            self._fail(work, seats.requests[work.spans].tolist(), f"{type(result.error).__name__}: {result.error}")
        elif np.count_nonzero(result.verdicts.finite) == len(result.verdicts):
            self._advance(done, work, result.verdicts, passes, now)
        else:
            self._advance_finite(done, work, result.verdicts, passes, now)
        if aborted := self.admission.finish_aborted():
            work.touched += [each for each in aborted if each not in work.touched]

    def _fail(self, work: Work, requests: list[Request], error: str) -> None:
        """End requests of a committed pass with an error, but for those that it ended or that were to be aborted."""
        for request in requests:
            if request.finish_reason is None:
                reason = request.abort_asked or FinishReason.ERROR
                self.admission.finish(request.request_id, reason, error if reason is FinishReason.ERROR else None)
        work.touched += [each for each in requests if each not in work.touched]

    def _advance_finite(self, done: Pass, work: Work, verdicts: Verdicts, passes: int, now: float) -> None:
        """As `_advance`, of a pass some of whose logits are NaN or infinite: these requests end with an error."""
        broken = dict.fromkeys(self.seats.requests[work.asked.seats[~verdicts.finite]].tolist())
        work.asked = work.asked.kept(verdicts.finite)
        self._advance(done, work, verdicts.kept(verdicts.finite), passes, now)
        layers = sum(self.placement.layout.lengths[: work.last + 1])
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

    def _advance(self, done: Pass, work: Work, verdicts: Verdicts, passes: int, now: float) -> None:
        """Rows have passed a segment: they are decided, or wait for the next one."""
        seats, segment, asked = self.seats, work.last, work.asked
        settled = seats.settled[asked.arrived]
        seats.advance(work.spans, done.segment, segment, done.stops)
        self.placement.passed(segment, work.placed)
        decided, written = self.decisions.take_in(segment, asked, verdicts, self._exits(segment, asked, verdicts))
        self.placement.skip_ahead(work.spans)
        seats.arrive(asked.arrived, passes)
        if work.prompts:
            seats.caught_up(work.spans)
        if segment + 1 < self.segments and self.anyone_due:
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
        ahead = self.policy.rule.prices.seconds_ahead(segment, live, fills)
        self.deadlines.buffered(self.seats.due[spans], now, ahead)

    def _emit(self, decided: Decided, written: list[tuple[Request, int]], work: Work, now: float) -> None:
        """Requests got tokens: they set when the next is due, and may be the last."""
        seats, live = self.seats, decided.live
        rows, first, anyone_due = [], 0, self.anyone_due
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
        full_step = self.policy.rule.prices.full_step(seats.decoding) if rows or written else 0.0
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
        self.seats.next_is_due(request)
        reason = request.abort_asked or request.ending(token, number)
        if reason is not None:
            self.admission.finish(request.request_id, reason)

    def took(self, done: Pass, seconds: float, passes: int) -> None:
        """Learn how long a committed pass took, the engine's own time included; `passes` were planned so far."""
        load, work, rule = Load.of(done.last), self._outstanding.pop(done.number), self.policy.rule
        if done.then is None:
            self.cost.observe(done.segment, load, seconds)
        else:
            self.cost.observe_through(load, seconds)
        if not work.prompts:
            rule.observe(work.decided, seconds, checked=work.checking)
            if done.segment == 0:
                lengths = load.entries if done.then is None else total(done.context.lengths)
                self.context = lengths / done.spans
        elif work.live:
            # Prompts came along: the decode rows' share is what they would have taken alone.
            alone = (
                float(rule.prices.seconds(done.segment, work.live, work.fills))
                if done.then is None
                else rule.prices.full_step(work.live)
            )
            rule.observe(work.decided, alone, checked=work.checking)
        rule.prepare(passes, self.context)

    def work(self, done: Pass) -> Work:
        """What a pass that `took` was not yet told of did."""
        return self._outstanding[done.number]
