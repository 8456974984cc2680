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

import numpy as np

from drex.config import EngineConfig, ExitRule
from drex.control.arena import ArenaRows
from drex.control.buffer import RebatchBuffer
from drex.control.plan import Evaluation, IntArray, Pass, PassResult, Rows, Span, Verdict
from drex.control.policies import POLICIES, Ready
from drex.control.slots import SegmentTable, SlotLayout, SlotPool
from drex.request import ExitCheck, FinishReason, Request, TokenRecord, Undecided

NO_INTS: IntArray = np.empty(0, dtype=np.int64)


class Scheduler:
    """Owns the requests, their tables, the arena rows and the rebatching buffers.

    Args:
        config: with `kv_cache_tokens` resolved.
        layout: of the segments.
        kv_fill: what fills the layers that a token skipped.
    """

    def __init__(self, config: EngineConfig, layout: SlotLayout, kv_fill: str) -> None:
        assert config.kv_cache_tokens is not None
        self.config, self.layout, self.kv_fill = config, layout, kv_fill
        self.segments = len(layout.lengths)
        self.pool = SlotPool(layout, config.kv_cache_tokens)
        self.arena = ArenaRows(config.arena_rows if self.segments > 1 else 0)
        self.buffers = [RebatchBuffer() for _ in range(self.segments)]
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self.passes = 0
        self._requests: dict[str, Request] = {}
        self._tables: dict[str, tuple[SegmentTable, ...]] = {}
        self._policy = POLICIES[config.policy]
        self._fills_owed = kv_fill in ("recompute", "project")

    # Requests come and go

    def check_fits(self, request: Request) -> None:
        """Raise ValueError for a request that could never be served, alone in the pool."""
        # The last token is never run, so it needs no K/V.
        length = len(request.prompt) + request.max_tokens - 1
        if length * sum(self.layout.lengths) > self.pool.capacity:
            raise ValueError(
                f"prompt ({len(request.prompt)}) and max_tokens ({request.max_tokens}) need K/V for {length} tokens "
                f"and the pool holds {self.config.kv_cache_tokens}: shorten one of them, or raise kv_cache_tokens"
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError for one that could never fit."""
        self.check_fits(request)
        assert request.request_id not in self._requests
        self._requests[request.request_id] = request
        bisect.insort(self.waiting, request, key=_urgency)

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
        self.running.remove(request)
        del self._tables[request.request_id]
        self.pool.close(request.request_id)
        self.pool.claim(-request.claimed)
        request.claimed = request.claimed_length = 0
        self.arena.close(request.request_id)
        for buffer in self.buffers:
            buffer.discard(request.request_id)

    def _preempt(self) -> bool:
        """Send the last of the running requests back to the queue; False if that would be the only one."""
        candidates = [request for request in self.running[1:] if not request.in_pass]
        if not candidates:
            return False
        request = candidates[-1]
        self._drop(request)
        request.frontiers = [0] * self.segments
        request.undecided.clear()
        bisect.insort(self.waiting, request, key=_urgency)
        self.preemptions += 1
        return True

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            needed = sum(self._slots_at(request, position) for position in range(len(request.tokens)))
            # Room for everyone's next token beside it: else it would be preempted before it got anywhere.
            if not self.pool.fits(needed + len(self.running) * sum(self.layout.lengths)):
                return
            self.waiting.pop(0)
            self.pool.claim(needed)
            request.claimed, request.claimed_length = needed, len(request.tokens)
            room = len(request.prompt) + request.max_tokens
            self._tables[request.request_id] = self.pool.open(request.request_id, room)
            bisect.insort(self.running, request, key=_urgency)

    # The next pass

    def next(self) -> Pass | None:
        """The next pass, or None while nothing can run (outstanding passes aside). Call `commit` with its result."""
        self._admit()
        while True:
            segment = self._choose()
            if segment is not None:
                spans = self._spans(segment)
                assert spans
                self.passes += 1
                return Pass(self.passes - 1, segment, spans)
            if not self.running or not self._preempt():
                return None

    def _choose(self) -> int | None:
        idle = [request for request in self.running if not request.in_pass]
        shallow = sum(1 for _ in self._shallow(idle))
        if not shallow:
            # Rows for segment 0 may be short of slots or arena rows: what is pending deeper makes room.
            blocked = any(request.pending(0) for request in idle)
            for segment in range(self.segments - 1, 0, -1):
                if blocked and any(request.pending(segment) for request in idle):
                    return segment
        if self._fill_rows(idle) > self.config.max_fill_rows:
            return max(range(1, self.segments), key=lambda s: sum(request.pending(s) for request in idle))
        waits = [self._waiting_at(segment, idle) for segment in range(self.segments)]
        ready = Ready(
            shallow=shallow,
            buffered=tuple(sum(r.request_id in self.buffers[s] for r in waits[s]) for s in range(self.segments)),
            urgent=tuple(sum(r.request_id not in self.buffers[s] for r in waits[s]) for s in range(self.segments)),
            oldest_age=tuple(buffer.oldest_age(self.passes) for buffer in self.buffers),
            decoding=sum(request.decoding for request in self.running),
        )
        return self._policy(ready, self.config)

    def _waiting_at(self, segment: int, idle: list[Request]) -> list[Request]:
        """Requests that a pass over a deeper segment would bring on: not those that only owe fills there."""
        if segment == 0:
            return []
        return [
            request
            for request in idle
            if request.pending(segment) and (not request.decoding or request.live_segment == segment)
        ]

    def _fill_rows(self, idle: list[Request]) -> int:
        """Rows whose token is decided and that only owe K/V."""
        if not self._fills_owed:
            return 0
        return sum(
            request.frontiers[0] - request.frontiers[-1] - (0 if request.live_segment == 0 else 1)
            for request in idle
            if request.decoding
        )

    def _shallow(self, idle: list[Request]) -> Iterator[tuple[Request, int]]:
        """Requests and how many of their rows fit into a pass over segment 0: decode rows, then prompts in chunks."""
        budget = self.config.max_num_batched_tokens
        slots = self.pool.capacity - self.pool.claimed
        rows = self.arena.free if self.segments > 1 else budget
        per_token = sum(self.layout.lengths)
        for decoding in (True, False):
            for request in idle:
                if budget == 0 or rows == 0:
                    return
                pending = request.pending(0)
                if request.decoding != decoding or not pending:
                    continue
                count = min(pending, budget, rows)
                if request.frontiers[0] >= request.claimed_length:
                    if slots < per_token:
                        continue
                    slots -= per_token
                yield request, count
                budget -= count
                rows -= count

    def _spans(self, segment: int) -> tuple[Span, ...]:
        idle = [request for request in self.running if not request.in_pass]
        chosen = list(self._shallow(idle) if segment == 0 else self._deep(segment, idle))
        return tuple(self._span(request, segment, count) for request, count in chosen)

    def _deep(self, segment: int, idle: list[Request]) -> Iterator[tuple[Request, int]]:
        """Buffered rows by age, then prompts, each with the fills they owe; only fills where nothing waits."""
        by_id = {request.request_id: request for request in self._waiting_at(segment, idle)}
        order = [by_id.pop(i) for i in self.buffers[segment].oldest_first() if i in by_id]
        order.extend(by_id.values())
        if not order or self._fill_rows(idle) > self.config.max_fill_rows:
            rest = [request for request in idle if request.pending(segment) and request not in order]
            order.extend(sorted(rest, key=lambda request: -request.pending(segment)))
        budget = self.config.max_num_batched_tokens
        for request in order:
            if budget == 0:
                return
            count = min(request.pending(segment), budget)
            yield request, count
            budget -= count

    # One request's part in a pass

    def _runs(self, request: Request, position: int, segment: int) -> bool:
        """Whether a position executes a segment in full."""
        if position >= len(request.depths) or request.depths[position] > segment:
            return True
        return self.kv_fill == "recompute"

    def _slots_at(self, request: Request, position: int) -> int:
        """Slots that a position takes over all segments, at most."""
        if self._fills_owed or position >= len(request.depths):
            return sum(self.layout.lengths)
        return sum(self.layout.lengths[: request.depths[position]])

    def _span(self, request: Request, segment: int, count: int) -> Span:
        start = request.frontiers[segment]
        stop = start + count
        if segment == 0 and stop > request.claimed_length:
            self._claim(request, sum(self.layout.lengths))
            request.claimed_length = stop
        if segment == 0 and self.segments > 1:
            self.arena.take(request.request_id, range(start, stop))
        full, fill = self._place(request, segment, range(start, stop))
        request.in_pass = True
        if stop == len(request.tokens):
            self.buffers[segment].discard(request.request_id)
        return Span(
            request_id=request.request_id,
            start=start,
            stop=stop,
            tokens=np.array(request.tokens[start:stop], dtype=np.int64) if segment == 0 else NO_INTS,
            full=full,
            fill=fill,
            context=self._tables[request.request_id][segment].context(),
            evaluations=tuple(self._evaluations(request, segment, full)),
        )

    def _claim(self, request: Request, slots: int) -> None:
        self.pool.claim(slots)
        request.claimed += slots

    def _place(self, request: Request, segment: int, positions: range) -> tuple[Rows, Rows]:
        """Give each position its entry in the segment's table; returns the rows that run and those that only fill."""
        table = self._tables[request.request_id][segment]
        if segment == 0 or self._fills_owed or not self._skips(request, segment, positions):
            before = table.count
            cells = self.pool.extend(table, len(positions))
            numbers = np.arange(positions.start, positions.stop)
            visible = np.arange(before + 1, before + 1 + len(positions))
            runs = np.array([self._runs(request, position, segment) for position in positions], dtype=np.bool_)
            arena = self._arena_rows(request, positions)
            if runs.all():
                return Rows(numbers, arena, cells, visible), _no_rows(len(cells))
            full, fill = (Rows(numbers[keep], arena[keep], cells[:, keep], visible[keep]) for keep in (runs, ~runs))
            return full, fill
        return self._place_skipping(request, segment, positions, table), _no_rows(table.cells.shape[0])

    def _skips(self, request: Request, segment: int, positions: range) -> bool:
        return any(not self._runs(request, position, segment) for position in positions)

    def _place_skipping(self, request: Request, segment: int, positions: range, table: SegmentTable) -> Rows:
        """As `_place`, one position at a time: some have an aliased or absent entry (a replay under alias or mask)."""
        ran: list[int] = []
        cells: list[IntArray] = []
        visible: list[int] = []
        for position in positions:
            if self._runs(request, position, segment):
                cells.append(self.pool.extend(table, 1))
                ran.append(position)
                visible.append(table.count)
            else:
                self._skip_entry(request, segment, position)
        return Rows(
            np.array(ran, dtype=np.int64),
            self._arena_rows(request, ran),
            np.concatenate(cells, axis=1) if cells else np.empty((table.cells.shape[0], 0), dtype=np.int64),
            np.array(visible, dtype=np.int64),
        )

    def _skip_entry(self, request: Request, segment: int, position: int) -> None:
        """What the table of a skipped segment gets for a position: an alias of the exit layer, or nothing."""
        if self.kv_fill == "alias":
            tables = self._tables[request.request_id]
            exit_cell = int(tables[request.depths[position] - 1].cells[-1, position])
            tables[segment].append_alias(self.pool.slot(exit_cell))

    def _arena_rows(self, request: Request, positions: Iterable[int]) -> IntArray:
        if self.segments == 1:
            return NO_INTS
        return np.array([self.arena.row(request.request_id, position) for position in positions], dtype=np.int64)

    def _evaluations(self, request: Request, segment: int, full: Rows) -> Iterator[Evaluation]:
        """Heads to evaluate: those of rows that are not decided and may exit here, or end here."""
        final = segment == self.segments - 1
        if request.score_rule is not None:
            for row, position in enumerate(full.positions.tolist()):
                if position < len(request.prompt) - 1 and position not in request.prompt_records:
                    threshold = None if final else request.score_rule.threshold(segment, position, len(request.prompt))
                    if final or threshold is not None:
                        target = request.tokens[position + 1]
                        yield self._evaluation(request, row, position, threshold, request.score_rule, target)
        last = len(request.tokens) - 1
        if not len(full) or int(full.positions[-1]) != last:
            return
        threshold = None
        if not final and request.num_output:
            threshold = request.rule.threshold(segment, request.num_output, request.max_tokens)
        if final or threshold is not None:
            yield self._evaluation(request, len(full) - 1, last, threshold, request.rule, None)

    def _evaluation(
        self, request: Request, row: int, position: int, threshold: float | None, rule: ExitRule, target: int | None
    ) -> Evaluation:
        return Evaluation(
            row=row,
            position=position,
            threshold=threshold,
            rule=rule,
            agreeing=request.undecided.setdefault(position, Undecided()).agreeing,
            params=request.params,
            seed=request.seed,
            sample=request.sample,
            tokens=request.tokens,
            prompt_length=len(request.prompt),
            banned=request.banned() if target is None else (),
            target=target,
        )

    # What a pass brought

    def commit(self, done: Pass, result: PassResult) -> list[Request]:
        """Take in a result: frontiers move, tokens are appended. Returns the requests that got a token or ended."""
        touched: list[Request] = []
        for index, span in enumerate(done.spans):
            request = self._requests[span.request_id]
            request.in_pass = False
            if result.error is not None or request.abort_asked is not None:
                self.finish(span.request_id, request.abort_asked or FinishReason.ERROR)
                touched.append(request)
                continue
            before = len(request.tokens)
            self._advance(request, done.segment, span, result.verdicts[index])
            if len(request.tokens) > before:
                touched.append(request)
                reason = request.ending()
                if reason is not None:
                    self.finish(request.request_id, reason)
        return touched

    def _advance(self, request: Request, segment: int, span: Span, verdicts: tuple[Verdict, ...]) -> None:
        request.frontiers[segment] = span.stop
        if self.segments > 1:
            self._release_rows(request, segment, span)
        for evaluation, verdict in zip(span.evaluations, verdicts, strict=True):
            row = request.undecided[evaluation.position]
            row.agreeing = verdict.agreeing
            if evaluation.threshold is not None:
                row.checks.append(ExitCheck(segment, verdict.confidence, evaluation.threshold))
            if verdict.exited or segment == self.segments - 1:
                self._decide(request, evaluation, segment + 1, verdict)
        self._skip_ahead(request)
        self._enter_buffer(request)

    def _release_rows(self, request: Request, segment: int, span: Span) -> None:
        """Arena rows of positions that execute nothing deeper."""
        for position in (*span.full.positions.tolist(), *span.fill.positions.tolist()):
            decided = position < len(request.depths)
            ends = request.depths[position] if decided and not self._fills_owed else self.segments
            if segment + 1 >= ends:
                self.arena.release(request.request_id, position)

    def _decide(self, request: Request, evaluation: Evaluation, depth: int, verdict: Verdict) -> None:
        """A row has its token: the live row's is appended, a scored one's was known."""
        position = evaluation.position
        checks = tuple(request.undecided.pop(position).checks)
        record = TokenRecord(verdict.token_id, verdict.logprob, depth, verdict.confidence, checks, verdict.top)
        if depth < self.segments and not self._fills_owed:
            self.arena.release(request.request_id, position)
            self._claim(request, -sum(self.layout.lengths[depth:]))
        if evaluation.target is not None:
            request.prompt_records[position] = record
            request.depths[position] = depth
            return
        request.records.append(record)
        request.depths.append(depth)
        request.tokens.append(verdict.token_id)

    def _skip_ahead(self, request: Request) -> None:
        """Move frontiers past positions that take no row at a segment (alias and mask owe nothing)."""
        if self._fills_owed:
            return
        for segment in range(1, self.segments):
            position = request.frontiers[segment]
            while position < request.frontiers[segment - 1] and not self._runs(request, position, segment):
                self._skip_entry(request, segment, position)
                position += 1
            request.frontiers[segment] = position

    def _enter_buffer(self, request: Request) -> None:
        """A live row that has come to a boundary waits there, but for a request's first token."""
        segment = request.live_segment
        if segment and request.num_output and request.request_id not in self.buffers[segment]:
            self.buffers[segment].add(request.request_id, self.passes)

    # Checks

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, arena rows, buffers and frontiers agree with the requests."""
        self.pool.check_integrity(request.request_id for request in self.running)
        self.arena.check_integrity()
        assert self.pool.claimed == sum(request.claimed for request in self.running)
        for request in self.running:
            frontiers = request.frontiers
            assert frontiers == sorted(frontiers, reverse=True), f"frontiers {frontiers} of {request.request_id}"
            executed = 0
            for segment, frontier in enumerate(frontiers):
                took = sum(self._fills_owed or self._runs(request, p, segment) for p in range(frontier))
                executed += took * self.layout.lengths[segment]
            held = sum(len(table.own_cells()) for table in self._tables[request.request_id])
            if not request.in_pass:
                assert held * self.layout.layers_per_cell == executed
        if not self.running:
            assert self.pool.in_use == self.pool.claimed == 0
            assert not any(self.buffers)
            assert self.arena.free == self.arena.capacity


def _urgency(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival


def _no_rows(parts: int) -> Rows:
    return Rows(NO_INTS, NO_INTS, np.empty((parts, 0), dtype=np.int64), NO_INTS)
