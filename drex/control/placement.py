"""Where a request's rows are: K/V entries in its tables, rows of the arena, and the slots it has claimed.

Positions that have exited are treated by the kind of their fill: under `recompute` and `project` they owe K/V at the
deeper segments and keep their arena row until it is written; under `alias` and `mask` they owe nothing, and the deeper
tables get an alias of the exit layer's slot, or no entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress

from drex.control.arena import ArenaRows
from drex.control.plan import Context, Rows, Span
from drex.control.slots import SegmentTable, SlotLayout, SlotPool
from drex.request import Request

NO_ROWS = Rows((), (), (), ())


class Placement:
    """Owns the slot pool, the tables and the arena rows.

    Args:
        layout: of the segments.
        kv_fill: what fills the layers that a token skipped.
        tokens: how many fit into the pool at every layer.
        arena_rows: hidden states that can wait between segments.
    """

    def __init__(self, layout: SlotLayout, kv_fill: str, tokens: int, arena_rows: int) -> None:
        self.layout, self.kv_fill = layout, kv_fill
        self.segments = len(layout.lengths)
        self.fills_owed = kv_fill in ("recompute", "project")
        self.slots_per_token = sum(layout.lengths)
        self.pool = SlotPool(layout, tokens)
        self.arena = ArenaRows(arena_rows if self.segments > 1 else 0)
        self._tables: dict[str, tuple[SegmentTable, ...]] = {}

    def open(self, request: Request) -> None:
        """Claim the slots of all tokens that a request has, and give it tables; `slots_needed` was seen to fit."""
        needed = self.slots_needed(request)
        self.pool.claim(needed)
        request.claimed, request.claimed_length = needed, len(request.tokens)
        room = len(request.prompt) + request.max_tokens
        self._tables[request.request_id] = self.pool.open(request.request_id, room)

    def close(self, request: Request) -> None:
        """Take back everything that a request has here."""
        del self._tables[request.request_id]
        self.pool.close(request.request_id)
        self.pool.claim(-request.claimed)
        request.claimed = request.claimed_length = 0
        self.arena.close(request.request_id)

    def slots_needed(self, request: Request) -> int:
        """Slots that the tokens a request has now take at most, over all segments."""
        if self.fills_owed:
            return len(request.tokens) * self.slots_per_token
        skipped = sum(sum(self.layout.lengths[depth:]) for depth in request.depths)
        return len(request.tokens) * self.slots_per_token - skipped

    def runs(self, request: Request, position: int, segment: int) -> bool:
        """Whether a position executes a segment in full."""
        if position >= len(request.depths) or request.depths[position] > segment:
            return True
        return self.kv_fill == "recompute"

    def place(self, request: Request, segment: int, start: int, stop: int) -> tuple[Rows, Rows, tuple[Context, ...]]:
        """Give the positions [start, stop) what they need to pass a segment.

        Returns:
            The rows that run, the rows that only write K/V, and the request's entries, these rows' included.
        """
        positions = range(start, stop)
        if segment == 0:
            if stop > request.claimed_length:
                self._claim(request, (stop - request.claimed_length) * self.slots_per_token)
                request.claimed_length = stop
            if self.segments > 1:
                self.arena.take(request.request_id, positions)
        table = self._tables[request.request_id][segment]
        if self.fills_owed or all(self.runs(request, position, segment) for position in positions):
            full, fill = self._place_all(request, segment, positions, table)
        else:
            full, fill = self._place_some(request, segment, positions, table), NO_ROWS
        return full, fill, table.context()

    def _place_all(self, request: Request, segment: int, positions: range, table: SegmentTable) -> tuple[Rows, Rows]:
        """Every position has an entry of its own."""
        first = table.count + 1
        cells = self.pool.extend(table, len(positions))
        rows = Rows(positions, self._arena_rows(request, positions), cells, range(first, first + len(positions)))
        if self.kv_fill != "project" or segment == 0:
            return rows, NO_ROWS
        runs = [self.runs(request, position, segment) for position in positions]
        return (rows, NO_ROWS) if all(runs) else (_some(rows, runs), _some(rows, [not run for run in runs]))

    def _place_some(self, request: Request, segment: int, positions: range, table: SegmentTable) -> Rows:
        """Some positions have an aliased or absent entry: a replay, or a scored text, under alias or mask."""
        ran: list[int] = []
        cells: list[list[int]] = [[] for _ in range(table.parts)]
        visible: list[int] = []
        for position in positions:
            if self.runs(request, position, segment):
                for held, taken in zip(cells, self.pool.extend(table, 1), strict=True):
                    held.extend(taken)
                ran.append(position)
                visible.append(table.count)
            else:
                self._skip_entry(request, segment, position)
        return Rows(ran, self._arena_rows(request, ran), tuple(cells), visible)

    def _skip_entry(self, request: Request, segment: int, position: int) -> None:
        """What the table of a skipped segment gets for a position: an alias of the exit layer, or nothing."""
        if self.kv_fill == "alias":
            tables = self._tables[request.request_id]
            exit_cell = tables[request.depths[position] - 1].cell(-1, position)
            tables[segment].append_alias(self.pool.slot(exit_cell))

    def _arena_rows(self, request: Request, positions: Sequence[int]) -> Sequence[int]:
        if self.segments == 1:
            return [0] * len(positions)
        return self.arena.rows(request.request_id, positions)

    def _claim(self, request: Request, slots: int) -> None:
        self.pool.claim(slots)
        request.claimed += slots

    def passed(self, request: Request, segment: int, span: Span) -> None:
        """A span has passed a segment: rows that execute nothing deeper leave the arena."""
        if self.segments == 1 or (self.fills_owed and segment + 1 < self.segments):
            return
        for position in (*span.full.positions, *span.fill.positions):
            decided = position < len(request.depths)
            ends = request.depths[position] if decided and not self.fills_owed else self.segments
            if segment + 1 >= ends:
                self.arena.release(request.request_id, position)

    def exited(self, request: Request, position: int, depth: int) -> None:
        """A row has exited after `depth` segments: if it owes nothing, it gives back what it will not use."""
        if not self.fills_owed:
            self.arena.release(request.request_id, position)
            self._claim(request, -sum(self.layout.lengths[depth:]))

    def skip_ahead(self, request: Request) -> None:
        """Move frontiers past positions that take no row at a segment."""
        if self.fills_owed:
            return
        for segment in range(1, self.segments):
            position = request.frontiers[segment]
            while position < request.frontiers[segment - 1] and not self.runs(request, position, segment):
                self._skip_entry(request, segment, position)
                position += 1
            request.frontiers[segment] = position

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raise AssertionError unless slots and arena rows agree with the requests that run."""
        requests = list(running)
        self.pool.check_integrity(request.request_id for request in requests)
        self.arena.check_integrity()
        assert self.pool.claimed == sum(request.claimed for request in requests)
        for request in requests:
            frontiers = request.frontiers
            assert frontiers == sorted(frontiers, reverse=True), f"frontiers {frontiers} of {request.request_id}"
            executed = 0
            for segment, frontier in enumerate(frontiers):
                took = sum(self.fills_owed or self.runs(request, p, segment) for p in range(frontier))
                executed += took * self.layout.lengths[segment]
            held = sum(len(table.own_cells()) for table in self._tables[request.request_id])
            if not request.in_pass:
                assert held * self.layout.layers_per_cell == executed
        if not requests:
            assert self.pool.in_use == self.pool.claimed == 0
            assert self.arena.free == self.arena.capacity


def _some(rows: Rows, wanted: Sequence[bool]) -> Rows:
    """Those rows that are wanted."""
    positions, arena, visible = (list(compress(part, wanted)) for part in (rows.positions, rows.arena, rows.visible))
    return Rows(positions, arena, tuple(list(compress(cells, wanted)) for cells in rows.cells), visible)
