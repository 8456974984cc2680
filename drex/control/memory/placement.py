"""Where the rows of a pass are: K/V entries in the tables, rows of the arena, and the slots that are claimed.

Positions that have exited are treated by the kind of their fill: under `recompute` and `project` they owe K/V at the
deeper segments and keep their arena row until it is written; under `alias` and `mask` they owe nothing, and the deeper
tables get an alias of the exit layer's slot, or no entry.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from drex.control.memory.arena import ArenaRows
from drex.control.memory.slots import SlotLayout, SlotPool
from drex.control.plan import BoolArray, Contexts, IntArray, Rows, ragged, total
from drex.control.request import Request
from drex.control.seats import Seats

NO_ROWS = Rows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((1, 0), np.int64))


class Placed(NamedTuple):
    """The rows of a pass.

    Attributes:
        seats, positions: of all positions in its spans; places: where these are in the columns by position.
        executes: which of them run the segment or write K/V there; the others have an aliased or absent entry. None:
            all.
        full, fill: rows that run, and that only write K/V; owners: seats of the full ones, full_places: their places.
        visible: entries that each full row attends to, its own included.
        sizes: full rows of each span.
        context: what the spans' rows read.
    """

    seats: IntArray
    positions: IntArray
    places: IntArray
    executes: BoolArray | None
    owners: IntArray
    full_places: IntArray
    full: Rows
    fill: Rows
    visible: IntArray
    sizes: IntArray
    context: Contexts


class Placement:
    """Owns the slot pool, its tables, and the arena rows.

    Args:
        layout: of the segments.
        kv_fill: what fills the layers that a token skipped.
        tokens: how many fit into the pool at every layer.
        arena_rows: hidden states that can wait between segments.
        seats: of the requests; frontiers move here only past positions that take no row.
    """

    def __init__(self, layout: SlotLayout, kv_fill: str, tokens: int, arena_rows: int, seats: Seats) -> None:
        self.layout, self.kv_fill, self.seats = layout, kv_fill, seats
        self.segments = len(layout.lengths)
        self.fills_owed = kv_fill in ("recompute", "project")
        self.slots_per_token = sum(layout.lengths)
        self.pool = SlotPool(layout, tokens, len(seats.requests), seats.room)
        self.arena = ArenaRows(arena_rows if self.segments > 1 else 0, len(seats.requests), seats.room)
        self._skipped = np.array([sum(layout.lengths[depth:]) for depth in range(self.segments + 1)])

    def slots_needed(self, request: Request) -> int:
        """Slots that the tokens a request has now take at most, over all segments."""
        needed = len(request.tokens) * self.slots_per_token
        return needed if self.fills_owed else needed - int(self._skipped[request.depths].sum())

    def open(self, request: Request) -> None:
        """Claim the slots of all tokens that a seated request has, and give it tables; they were seen to fit."""
        assert request.seat is not None
        self.pool.claim(self.slots_needed(request))
        self.seats.claim(np.array([request.seat]), np.array([len(request.tokens)]))
        self.pool.open(request.seat, len(request.prompt) + request.max_tokens - 1)

    def close(self, request: Request) -> None:
        """Take back everything that a request has here."""
        seat = request.seat
        assert seat is not None
        self.pool.claim(-self.claimed(seat))
        self.pool.close(seat)
        self.arena.close(seat, int(self.seats.claimed_length[seat]))

    def claimed(self, seat: int) -> int:
        """Slots that a seated request has claimed."""
        length = int(self.seats.claimed_length[seat])
        if self.fills_owed:
            return length * self.slots_per_token
        return length * self.slots_per_token - int(self._skipped[self.seats.depth[seat, :length]].sum())

    def place(self, segment: int, seats: IntArray, starts: IntArray, stops: IntArray) -> Placed:
        """Give the positions [start, stop) of requests what they need to pass a segment. Shapes: (spans,) each."""
        rows, positions, sizes = seats, starts, stops - starts
        if total(sizes) > len(sizes):
            span, positions = ragged(starts, stops)
            rows = seats[span]
        places, table = self.seats.places(rows, positions), self.pool.tables[segment]
        if segment == 0:
            self._claim(seats, stops, rows, positions)
        arena = self._arena(segment, places)
        if segment == 0 or self.kv_fill == "recompute" or (runs := self.seats.depth.take(places) > segment).all():
            return self._all_run(segment, seats, sizes, rows, positions, places, arena)
        span = ragged(starts, stops)[0]
        sizes, running = np.bincount(span[runs], minlength=len(seats)), places[runs]
        if self.kv_fill == "project":
            cells = self.pool.append(segment, rows, positions)
            written = Rows(positions, arena, cells)
            full, fill = _some(written, runs), _some(written, ~runs)
            visible = positions[runs] + 1
            contexts = table.contexts(seats)
            return Placed(rows, positions, places, None, rows[runs], running, full, fill, visible, sizes, contexts)
        entries, cells = self._append_some(segment, seats, span, positions, runs)
        full, visible = Rows(positions[runs], arena[runs], cells), entries[runs] + 1
        contexts = table.contexts(seats)
        return Placed(rows, positions, places, runs, rows[runs], running, full, NO_ROWS, visible, sizes, contexts)

    def place_each(self, first: int, last: int, seats: IntArray, starts: IntArray, stops: IntArray) -> list[Placed]:
        """As `place`, for the segments `first` to `last`; to more than one only what goes through."""
        placed = [self.place(first, seats, starts, stops)]
        rows, positions, places, sizes = placed[0].seats, placed[0].positions, placed[0].places, placed[0].sizes
        arena, deeper = placed[0].full.arena, range(first + 1, last + 1)
        return placed + [self._all_run(each, seats, sizes, rows, positions, places, arena) for each in deeper]

    def _all_run(
        self,
        segment: int,
        seats: IntArray,
        sizes: IntArray,
        rows: IntArray,
        positions: IntArray,
        places: IntArray,
        arena: IntArray,
    ) -> Placed:
        """Every position has an entry of its own; under mask some before it may have none."""
        table, entries = self.pool.tables[segment], positions
        if self.kv_fill == "mask":
            counts = table.counts[seats]
            entries = ragged(counts, counts + sizes)[1]
        cells = self.pool.append(segment, rows, entries)
        full, contexts = Rows(positions, arena, cells), table.contexts(seats)
        return Placed(rows, positions, places, None, rows, places, full, NO_ROWS, entries + 1, sizes, contexts)

    def goes_through(self, seats: IntArray, starts: IntArray, stops: IntArray) -> bool:
        """Whether positions [start, stop) of requests run in full at all segments, and nothing else has to before."""
        known = self.seats
        if np.count_nonzero(known.reached[1:].take(seats, axis=1) != starts):
            return False
        if self.kv_fill == "recompute":
            return True
        span, positions = ragged(starts, stops)
        return bool((known.depth[seats[span], positions] == self.segments).all())

    def _arena(self, segment: int, places: IntArray) -> IntArray:
        """The rows of the arena that positions have; they get them as they come to segment 0."""
        if self.segments == 1:
            return np.zeros_like(places)
        return self.arena.rows(places) if segment else self.arena.take(places)

    def _claim(self, seats: IntArray, stops: IntArray, rows: IntArray, positions: IntArray) -> None:
        """Claim the slots of positions that come to segment 0, where they aren't claimed yet."""
        lengths = self.seats.claimed_length
        self.pool.claim(int(np.count_nonzero(positions >= lengths[rows])) * self.slots_per_token)
        self.seats.claim(seats, stops)

    def _append_some(
        self, segment: int, seats: IntArray, span: IntArray, positions: IntArray, runs: BoolArray
    ) -> tuple[IntArray, IntArray]:
        """Entries where some positions have an aliased or absent one: a replay, or a scored text, under alias or mask.

        Returns:
            The index of each position's entry, (rows,), and the cells of those that run, (parts, running rows).
        """
        takes = runs | (self.kv_fill == "alias")
        before = self.pool.tables[segment].counts[seats]
        # How many entries came before each row's: in its table, and in its span.
        number = takes.cumsum() - takes
        first = np.searchsorted(span, np.arange(len(seats)))
        entries = before[span] + number - number[first][span]
        rows, skipped = seats[span], takes & ~runs
        cells = self.pool.append(segment, rows[runs], entries[runs])
        self._append_aliases(segment, rows[skipped], entries[skipped], positions[skipped])
        return entries, cells

    def _append_aliases(self, segment: int, rows: IntArray, entries: IntArray, positions: IntArray) -> None:
        """Entries of skipped positions under `alias`: each reads the slot of the layer that its token exited after."""
        left_after = self.seats.depth[rows, positions]
        for depth in np.unique(left_after).tolist():
            some = left_after == depth
            # A position has an entry of the same number wherever nothing is absent.
            cells = self.pool.tables[depth - 1].at(rows[some], positions[some])[-1]
            self.pool.append_aliases(segment, rows[some], entries[some], cells)

    def passed(self, segment: int, placed: Placed) -> None:
        """Rows have passed a segment, their tokens not yet judged: what executes nothing deeper leaves the arena."""
        if self.segments == 1 or (self.fills_owed and segment + 1 < self.segments):
            return
        places = placed.places if placed.executes is None else placed.places[placed.executes]
        if not self.fills_owed:
            places = places[self.seats.depth.take(places) <= segment + 1]
        self.arena.release(places)

    def exited(self, places: IntArray, depth: int) -> None:
        """Rows have exited after `depth` segments: if they owe nothing, they give back what they will not use."""
        if not self.fills_owed:
            self.arena.release(places)
            self.pool.claim(-len(places) * int(self._skipped[depth]))

    def skip_ahead(self, seats: IntArray) -> None:
        """Move frontiers past positions that take no row at a segment."""
        if self.fills_owed:
            return
        reached, depth = self.seats.reached, self.seats.depth
        for segment in range(1, self.segments):
            skipping = seats
            while len(skipping):
                positions = reached[segment + 1, skipping]
                # Where nothing is pending, the position may be one past the last of the request.
                pending = positions < reached[segment, skipping]
                skipping, positions = skipping[pending], positions[pending]
                skipped = depth[skipping, positions] <= segment
                skipping, positions = skipping[skipped], positions[skipped]
                if self.kv_fill == "alias":
                    self._append_aliases(segment, skipping, self.pool.tables[segment].counts[skipping], positions)
                self.seats.skip(segment, skipping)

    def roll_back(self, seat: int, keep: int) -> None:
        """Take back all that a request has beyond its first `keep` positions, which segment 0 has seen."""
        known, claimed = self.seats, self.claimed(seat)
        end = int(known.claimed_length[seat])
        for segment, table in enumerate(self.pool.tables):
            entries = min(keep, int(known.reached[segment + 1, seat]))
            if self.kv_fill == "mask":
                entries = int((known.depth[seat, :entries] > segment).sum())
            self.pool.cut(table, seat, entries)
        self.arena.close(seat, end, start=keep)
        known.take_back(seat, keep)
        self.pool.claim(self.claimed(seat) - claimed)

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots and arena rows agree with the requests that run."""
        held_by = [request.seat for request in self.seats if request.seat is not None]
        self.pool.check_integrity(held_by)
        self.arena.check_integrity()
        self.seats.check_integrity()
        assert self.pool.claimed == sum(self.claimed(seat) for seat in held_by)
        for seat in held_by:
            reached = self.seats.reached[:, seat]
            assert (reached[:-1] >= reached[1:]).all(), f"frontiers {reached}"
            for segment, table in enumerate(self.pool.tables):
                took = int(reached[segment + 1])
                if not self.fills_owed:
                    took = int((self.seats.depth[seat, :took] > segment).sum())
                if self.seats.idle[seat]:
                    assert len(table.own_cells(seat)) == took * table.parts
        if not held_by:
            assert self.pool.in_use == self.pool.claimed == 0
            assert self.arena.free == self.arena.capacity


def _some(rows: Rows, wanted: BoolArray) -> Rows:
    """Those rows that are wanted."""
    return Rows(rows.positions[wanted], rows.arena[wanted], rows.cells[:, wanted])
