"""Admission, capacity, and the next pass.

A request has no phase; at every segment it catches up: positions frontiers[s] … frontiers[s-1] - 1 are pending there.

Capacity. Nothing is reserved, but admitted work is *claimed*: all slots that a request's known tokens may still take.
A row enters segment 0 only if its slots at every layer can be claimed, so every pass over a deeper segment fits.
When no pass is possible, the latest-arrived request of the lowest priority loses its K/V and is admitted again later;
it then replays its tokens at the depths that were recorded. Since a request that could not fit alone was refused, the
one that is never preempted (the oldest of the highest priority) always gets on.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from drex.config import EngineConfig
from drex.control.arena import ArenaRows
from drex.control.cost import CostModel, Load
from drex.control.deadlines import Deadlines, tightest_tpot
from drex.control.decisions import evaluations, judge
from drex.control.placement import Placement
from drex.control.plan import Pass, PassResult, Span, Verdict
from drex.control.policies import POLICIES, Choice, View
from drex.control.selection import Selection, urgency
from drex.control.slots import SlotLayout, SlotPool
from drex.control.standing import Standing
from drex.request import FinishReason, Request


class Scheduler:
    """Owns the requests and, through `standing` and `placement`, where they wait and what they hold.

    The policy says which segment runs, the selection which rows; what they hold is claimed and placed here.

    Args:
        config: with `kv_cache_tokens` resolved.
        layout: of the segments.
        kv_fill: what fills the layers that a token skipped.
        cost: of passes; it learns from those that are run.

    Attributes:
        preemptions: how often a request has lost its K/V.
        passes: how many were planned.
        view: what the last pass was chosen from; None where there was no choice.
        unchecked: tokens that could have exited somewhere and were not asked (`adaptive`).
    """

    def __init__(self, config: EngineConfig, layout: SlotLayout, kv_fill: str, cost: CostModel) -> None:
        assert config.kv_cache_tokens is not None
        assert cost.segments == len(layout.lengths)
        self.config, self.layout, self.cost = config, layout, cost
        self.segments = len(layout.lengths)
        self.placement = Placement(layout, kv_fill, config.kv_cache_tokens, config.arena_rows)
        self.standing = Standing(self.segments)
        self.selection = Selection(config, self.placement, self.standing, cost)
        self.policy = POLICIES[config.policy](config, cost, kv_fill)
        self.deadlines = Deadlines(config.max_slowdown)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.view: View | None = None
        self.preemptions = self.passes = self.unchecked = self.decoding = 0
        self._requests: dict[str, Request] = {}
        self._outstanding: dict[int, Work] = {}
        self._context = 0.0

    @property
    def pool(self) -> SlotPool:
        """The K/V slots."""
        return self.placement.pool

    @property
    def arena(self) -> ArenaRows:
        """The rows of the hidden-state arena."""
        return self.placement.arena

    # Requests come and go

    def check_fits(self, request: Request) -> None:
        """Raise ValueError for a request that could never be served, alone in the pool."""
        # The last token is never run, so it needs no K/V.
        length = len(request.prompt) + request.max_tokens - 1
        if length * self.placement.slots_per_token > self.pool.capacity:
            raise ValueError(
                f"prompt ({len(request.prompt)}) and max_tokens ({request.max_tokens}) need K/V for {length} tokens "
                f"and the pool holds {self.config.kv_cache_tokens}: shorten one of them, or raise kv_cache_tokens"
            )

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Raises ValueError for one that could never fit."""
        self.check_fits(request)
        assert request.request_id not in self._requests
        request.arrived_at = now
        self._requests[request.request_id] = request
        bisect.insort(self.waiting, request, key=urgency)

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """End a request and free all it holds; if it is in an outstanding pass, as soon as that is committed."""
        request = self._requests[request_id]
        if request.in_pass:
            request.abort_asked = reason
            return
        request.finish_reason = reason
        del self._requests[request_id]
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self._drop(request)

    def _drop(self, request: Request) -> None:
        """Take a running request off the machine."""
        self.running.pop(bisect.bisect_left(self.running, urgency(request), key=urgency))
        self.decoding -= request.num_output > 0
        self.standing.leave(request)
        self.placement.close(request)

    def _preempt(self) -> bool:
        """Send the last of the running requests back to the queue; False if that would be the only one."""
        candidates = [request for request in self.running[1:] if not request.in_pass]
        if not candidates:
            return False
        request = candidates[-1]
        self._drop(request)
        request.frontiers = [0] * self.segments
        request.undecided.clear()
        request.waits_since = None
        bisect.insort(self.waiting, request, key=urgency)
        self.preemptions += 1
        return True

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            # Room for everyone's next token beside it: else it would be preempted before it got anywhere.
            spare = len(self.running) * self.placement.slots_per_token
            if not self.pool.fits(self.placement.slots_needed(request) + spare) or self._would_be_late():
                return
            self.waiting.pop(0)
            self.placement.open(request)
            bisect.insort(self.running, request, key=urgency)
            self.decoding += request.num_output > 0
            self.standing.enter(request, self.passes)

    def _would_be_late(self) -> bool:
        """Whether one more request would push running ones past targets that can be met at all."""
        tightest = tightest_tpot(self.running)
        return self.policy.rule.full_step(1) <= tightest < self.policy.rule.full_step(len(self.running) + 1)

    # The next pass

    def next(self, now: float) -> Pass | None:
        """The next pass, or None while nothing can run (outstanding passes aside). Call `commit` with its result."""
        self._admit()
        while True:
            choice = self._choose(now)
            if choice is not None:
                self.passes += 1
                return self._plan(choice, self.passes - 1, now)
            if not self.running or not self._preempt():
                return None

    def _choose(self, now: float) -> Choice | None:
        standing, self.view = self.standing, None
        fit = self.selection.ready_that_fit()
        prompts = self.selection.prompt_fits(beside=fit)
        if not fit and not prompts and (standing.ready or standing.urgent[0]):
            # Rows for segment 0 are short of slots or arena rows: what is pending deeper makes room.
            for segment in range(self.segments - 1, 0, -1):
                if standing.urgent[segment] or standing.buffers[segment] or standing.owed[segment]:
                    return Choice(segment, fills=True)
        if sum(standing.owed) > self.config.max_fill_rows:
            return Choice(max(range(1, self.segments), key=lambda s: standing.owed[s]), fills=True)
        buffers = standing.buffers
        self.view = View(
            pass_number=self.passes,
            now=now,
            ready=fit,
            prompts=prompts,
            live=[len(buffer) for buffer in buffers],
            fills=[buffer.fills for buffer in buffers],
            urgent=[len(urgent) for urgent in standing.urgent],
            oldest_age=[buffer.oldest_age(self.passes) for buffer in buffers],
            due=[buffer.earliest_due() for buffer in buffers],
            owed=standing.owed,
            decoding=self.decoding,
            context=self._context,
        )
        return self.policy.choose(self.view)

    def _plan(self, choice: Choice, number: int, now: float) -> Pass:
        checking = choice.segment > 0 or self.policy.checks_exits()
        chosen = list(self.selection.pick(choice, self.running, now))
        decode = [count for request, count in chosen if request.stands_at is not None]
        self._outstanding[number] = Work(len(decode), sum(decode) - len(decode), len(chosen) - len(decode))
        spans = [self._span(request, choice.segment, count, checking) for request, count in chosen]
        assert spans
        return Pass(number, choice.segment, spans)

    def _span(self, request: Request, segment: int, count: int, checking: bool) -> Span:
        self.standing.leave(request)
        start = request.frontiers[segment]
        stop = start + count
        full, fill, context = self.placement.place(request, segment, start, stop)
        request.in_pass = True
        if stop == len(request.tokens):
            request.waits_since = None
        asked = evaluations(request, segment, full)
        if not checking:
            self.unchecked += sum(each.threshold is not None and each.target is None for each in asked)
            asked = [each for each in asked if each.threshold is None or each.target is not None]
        tokens = request.tokens[start:stop] if segment == 0 else ()
        return Span(request.request_id, start, stop, tokens, full, fill, context, asked)

    # What a pass brought

    def commit(self, done: Pass, result: PassResult, now: float) -> list[Request]:
        """Take in a result: frontiers move, tokens are appended. Returns the requests that got a token or ended."""
        touched: list[Request] = []
        exits = self._exits(done, result)
        work = self._outstanding[done.number]
        for index, span in enumerate(done.spans):
            request = self._requests[span.request_id]
            request.in_pass = False
            if result.error is not None or request.abort_asked is not None:
                self.standing.enter(request, self.passes)
                self.finish(span.request_id, request.abort_asked or FinishReason.ERROR)
                touched.append(request)
                continue
            before = request.num_output
            self._advance(request, done.segment, span, result.verdicts[index], exits)
            if self.standing.enter(request, self.passes):
                self._buffered(request, now)
            if request.num_output > before:
                self.decoding += before == 0
                work.decided += before > 0
                touched.append(request)
                self.deadlines.emitted(request, now, self.policy.rule.full_step(self.decoding))
                reason = request.ending()
                if reason is not None:
                    self.finish(request.request_id, reason)
        return touched

    def took(self, done: Pass, seconds: float) -> None:
        """Learn how long a committed pass took, the engine's own time included."""
        load, work, rule = Load.of(done), self._outstanding.pop(done.number), self.policy.rule
        self.cost.observe(done.segment, load, seconds)
        if not work.prompts:
            rule.observe(work.decided, seconds)
            if done.segment == 0:
                self._context = load.entries / load.spans
        elif work.live:
            # Prompts came along: the decode rows' share is what they would have taken alone.
            rule.observe(work.decided, float(rule.seconds(done.segment, work.live, work.fills)))

    def work(self, done: Pass) -> Work:
        """What a pass that `took` was not yet told of did."""
        return self._outstanding[done.number]

    def _exits(self, done: Pass, result: PassResult) -> Iterator[bool]:
        """Which of the decode rows' checks in a pass end in an exit, in the pass's order."""
        if result.error is not None:
            return iter(())
        checks = [
            (evaluation, verdict)
            for span, verdicts in zip(done.spans, result.verdicts, strict=True)
            for evaluation, verdict in zip(span.evaluations, verdicts, strict=True)
            if evaluation.threshold is not None and evaluation.target is None
        ]
        if not checks:
            return iter(())
        exits = self.policy.exits(done.segment, checks)
        self.policy.rates.observe(done.segment, len(exits), sum(exits))
        return iter(exits)

    def _advance(
        self, request: Request, segment: int, span: Span, verdicts: Iterable[Verdict], exits: Iterator[bool]
    ) -> None:
        request.frontiers[segment] = span.stop
        self.placement.passed(request, segment, span)
        for evaluation, verdict in zip(span.evaluations, verdicts, strict=True):
            check = evaluation.threshold is not None and evaluation.target is None
            exited = next(exits) if check else verdict.exited
            if judge(request, segment, evaluation, verdict, exited) and segment < self.segments - 1:
                self.placement.exited(request, evaluation.position, segment + 1)
        self.placement.skip_ahead(request)

    def _buffered(self, request: Request, now: float) -> None:
        if request.due < float("inf"):
            standing, segment = self.standing.buffers, request.stands_at
            assert segment is not None
            live, fills = [len(buffer) for buffer in standing], [buffer.fills for buffer in standing]
            self.deadlines.buffered(request, now, self.policy.rule.seconds_ahead(segment, live, fills))

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, arena rows, buffers and frontiers agree with the requests."""
        self.placement.check_integrity(self.running)
        idle = {r.request_id: r for r in self.running if not r.in_pass}
        fresh = Standing(self.segments)
        for request in idle.values():
            stands, since = request.stands_at, request.waits_since
            fresh.enter(request, self.passes)
            assert (stands, since) == (request.stands_at, request.waits_since)
        assert fresh.owed == self.standing.owed
        assert fresh.ready.keys() == self.standing.ready.keys()
        for now, then in zip(self.standing.buffers, fresh.buffers, strict=True):
            assert set(now) == set(then)
            assert now.fills == then.fills
        assert [set(u) for u in self.standing.urgent] == [set(u) for u in fresh.urgent]
        assert self.decoding == sum(request.num_output > 0 for request in self.running)


@dataclass
class Work:
    """What an outstanding pass does: decoding requests, fills that they owe, other requests; tokens of the former."""

    live: int
    fills: int
    prompts: int
    decided: int = 0
