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
from collections.abc import Iterator

import numpy as np

from drex.config import EngineConfig
from drex.control.arena import ArenaRows
from drex.control.buffer import RebatchBuffer
from drex.control.decisions import evaluations, judge
from drex.control.placement import Placement
from drex.control.plan import Pass, PassResult, Span, Verdict
from drex.control.policies import POLICIES, Ready
from drex.control.slots import SlotLayout, SlotPool
from drex.request import FinishReason, Request


class Scheduler:
    """Owns the requests, the rebatching buffers and, through `placement`, what requests hold.

    Args:
        config: with `kv_cache_tokens` resolved.
        layout: of the segments.
        kv_fill: what fills the layers that a token skipped.
    """

    def __init__(self, config: EngineConfig, layout: SlotLayout, kv_fill: str) -> None:
        assert config.kv_cache_tokens is not None
        self.config, self.layout = config, layout
        self.segments = len(layout.lengths)
        self.placement = Placement(layout, kv_fill, config.kv_cache_tokens, config.arena_rows)
        self.buffers = [RebatchBuffer() for _ in range(self.segments)]
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self.passes = 0
        self._requests: dict[str, Request] = {}
        self._policy = POLICIES[config.policy]

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
        self.placement.close(request)
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
            # Room for everyone's next token beside it: else it would be preempted before it got anywhere.
            spare = len(self.running) * self.placement.slots_per_token
            if not self.pool.fits(self.placement.slots_needed(request) + spare):
                return
            self.waiting.pop(0)
            self.placement.open(request)
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
        if not self.placement.fills_owed:
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
        per_token = self.placement.slots_per_token
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

    def _span(self, request: Request, segment: int, count: int) -> Span:
        start = request.frontiers[segment]
        stop = start + count
        full, fill, context = self.placement.place(request, segment, start, stop)
        request.in_pass = True
        if stop == len(request.tokens):
            self.buffers[segment].discard(request.request_id)
        return Span(
            request_id=request.request_id,
            start=start,
            stop=stop,
            tokens=np.array(request.tokens[start:stop] if segment == 0 else (), dtype=np.int64),
            full=full,
            fill=fill,
            context=context,
            evaluations=tuple(evaluations(request, segment, full)),
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
        self.placement.passed(request, segment, span)
        for evaluation, verdict in zip(span.evaluations, verdicts, strict=True):
            if judge(request, segment, evaluation, verdict) and segment < self.segments - 1:
                self.placement.exited(request, evaluation.position, segment + 1)
        self.placement.skip_ahead(request)
        self._enter_buffer(request)

    def _enter_buffer(self, request: Request) -> None:
        """A live row that has come to a boundary waits there, but for a request's first token."""
        segment = request.live_segment
        if segment and request.num_output and request.request_id not in self.buffers[segment]:
            self.buffers[segment].add(request.request_id, self.passes)

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, arena rows, buffers and frontiers agree with the requests."""
        self.placement.check_integrity(self.running)
        for segment, buffer in enumerate(self.buffers):
            waiting = {r.request_id for r in self.running if r.live_segment == segment and r.decoding and segment}
            assert set(buffer.oldest_first()) <= waiting


def _urgency(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival
