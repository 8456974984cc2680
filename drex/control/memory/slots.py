"""K/V slots: one pool for all segments, a table a request and segment.

A slot is the K/V of one token at one layer. Slots are handed out in *cells* of g slots, g the greatest common divisor
of the segments' lengths; a token takes length / g cells at a segment, one for each *part* of g layers. Cells are all
of one size, so segments of unequal length share the pool without fragmentation, and slots in use are exactly the
executed (token, layer) pairs. A table's cells lie in one run where they can (attention then reads views): a new table
chooses a stretch with room to grow and marks it as preferred, which reserves nothing, since anyone short of cells
takes them there too.

Invariants: a cell is free or in exactly one table; `claimed` covers what admitted work may still take.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from drex.control.plan import NO_ENTRIES, BoolArray, Contexts, Entries, IntArray, ragged


@dataclass(frozen=True)
class SlotLayout:
    """How segments map to cells.

    Attributes:
        lengths: layers of each segment.
    """

    lengths: tuple[int, ...]

    @cached_property
    def layers_per_cell(self) -> int:
        return math.gcd(*self.lengths)

    def parts(self, segment: int) -> int:
        return self.lengths[segment] // self.layers_per_cell

    @property
    def cells_per_token(self) -> int:
        return sum(self.lengths) // self.layers_per_cell


class SegmentTables:
    """Entries of all requests at one segment, by seat, in order of position: own cells, or aliases of another slot.

    Shapes: counts (seats,) entries; low and high (parts, seats), the stretch that each part grows in, empty where there
    is none; in_run (seats,), whether all entries are own cells at `low` plus their index, and `scattered`, how many
    tables are not so; told (seats,), how many of the entries that lie in no run passes have told of. Where a request is
    not in a run, `_cells` (parts, seats, room) has its cells, or slots where `aliased` (seats, room).
    """

    def __init__(self, parts: int, seats: int, room: int) -> None:
        self.parts = parts
        # Left empty, so that only what is used ever takes memory.
        self._cells: IntArray = np.empty((parts, seats, room), dtype=np.int64)
        self.aliased: BoolArray = np.zeros((seats, room), dtype=np.bool_)
        self.counts: IntArray = np.zeros(seats, dtype=np.int64)
        self.low: IntArray = np.zeros((parts, seats), dtype=np.int64)
        self.high: IntArray = np.zeros((parts, seats), dtype=np.int64)
        self.in_run: BoolArray = np.ones(seats, dtype=np.bool_)
        self.scattered = 0
        self._all_in_run: BoolArray = np.ones(seats, dtype=np.bool_)
        self.told: IntArray = np.zeros(seats, dtype=np.int64)

    def entries(self, seat: int) -> tuple[IntArray, BoolArray]:
        """One request's: cells or slots (parts, count), and which are aliases (count,)."""
        count = self.counts[seat]
        if self.in_run[seat]:
            return self.low[:, seat, None] + np.arange(count), self.aliased[seat, :count]
        return self._cells[:, seat, :count], self.aliased[seat, :count]

    def at(self, seats: IntArray, entries: IntArray) -> IntArray:
        """Cells or slots of entries. Shapes: (rows,) each -> (parts, rows)."""
        return np.where(self.in_run[seats], self.low[:, seats] + entries, self._cells[:, seats, entries])

    def own_cells(self, seat: int) -> IntArray:
        """All cells that one request holds here, flat."""
        cells, aliased = self.entries(seat)
        own: IntArray = cells[:, ~aliased].reshape(-1)
        return own

    def put(self, seats: IntArray, entries: IntArray, cells: IntArray) -> None:
        """Note where entries are. Shapes: seats and entries (rows,), cells (parts, rows) or (rows,)."""
        if self.scattered:
            noted = ~self.in_run[seats]
            self._cells[:, seats[noted], entries[noted]] = cells[..., noted]

    def set_in_run(self, seat: int, in_run: bool) -> None:
        """Note whether the entries of a request lie in a run."""
        self.scattered += bool(self.in_run[seat]) - in_run
        self.in_run[seat] = in_run

    def leave_runs(self, seats: IntArray) -> None:
        """Requests get entries that are in no run with their others: note these."""
        for seat in np.unique(seats[self.in_run[seats]]).tolist():
            self._cells[:, seat, : self.counts[seat]], _ = self.entries(seat)
            self.set_in_run(seat, False)

    def contexts(self, seats: IntArray) -> Contexts:
        """What attention reads, by seat; the pass that it goes with tells of what is fresh."""
        lengths, starts = self.counts[seats], self.low.take(seats, axis=1)
        if not self.scattered:
            return Contexts(seats, lengths, self._all_in_run[: len(seats)], starts, NO_ENTRIES)
        in_run = self.in_run[seats]
        scattered = seats[~in_run]
        if not len(scattered):
            return Contexts(seats, lengths, in_run, starts, NO_ENTRIES)
        which, numbers = ragged(self.told[scattered], self.counts[scattered])
        of = scattered[which]
        fresh = Entries(of, numbers, self._cells[:, of, numbers], self.aliased[of, numbers])
        self.told[scattered] = self.counts[scattered]
        return Contexts(seats, lengths, in_run, starts, fresh)


class SlotPool:
    """All slots, and who may take how many.

    Args:
        layout: of the segments.
        tokens: how many tokens fit at every layer.
        seats: requests that can have tables.
        room: positions that a request may reach.

    Attributes:
        capacity: all slots.
    """

    def __init__(self, layout: SlotLayout, tokens: int, seats: int, room: int) -> None:
        self.layout = layout
        self.num_cells = tokens * layout.cells_per_token
        self.capacity = self.num_cells * layout.layers_per_cell
        self.claimed = 0
        self.tables = [SegmentTables(layout.parts(s), seats, room) for s in range(len(layout.lengths))]
        self._free: BoolArray = np.ones(self.num_cells, dtype=np.bool_)
        self._unpreferred: BoolArray = np.ones(self.num_cells, dtype=np.bool_)
        self._cells_in_use = 0
        # Where stretches began that tables have left: tried first by new ones.
        self._left: list[int] = []
        self._most_left = seats * layout.cells_per_token
        self._untouched = 0

    @property
    def in_use(self) -> int:
        """Slots that hold K/V, or are about to."""
        return self._cells_in_use * self.layout.layers_per_cell

    def fits(self, slots: int) -> bool:
        """Whether so many more can be claimed."""
        return self.claimed + slots <= self.capacity

    def claim(self, slots: int) -> None:
        """Count `slots` (negative: fewer) as spoken for; `fits` was asked before."""
        self.claimed += slots
        assert 0 <= self.claimed <= self.capacity, f"claimed {self.claimed} of {self.capacity} slots"

    def open(self, seat: int, room: int) -> None:
        """Give a request empty tables, with stretches of the pool where `room` positions could lie in one run."""
        starts = iter(self._find_stretches(room))
        for table in self.tables:
            assert table.counts[seat] == 0
            # The parts first: zip would drop a start that it took before it finds that no part is left.
            for part, start in zip(range(table.parts), starts, strict=False):
                table.low[part, seat], table.high[part, seat] = start, start + room

    def close(self, seat: int) -> None:
        """Free everything a request holds."""
        for table in self.tables:
            count, run = int(table.counts[seat]), bool(table.in_run[seat])
            if not run:
                cells = table.own_cells(seat)
                self._free[cells] = True
                self._cells_in_use -= len(cells)
                table.aliased[seat, :count] = False
                table.set_in_run(seat, True)
            for start, stop in zip(table.low[:, seat].tolist(), table.high[:, seat].tolist(), strict=True):
                if run:
                    self._free[start : start + count] = True
                    self._cells_in_use -= count
                self._unpreferred[start:stop] = True
                if stop > start:
                    self._left.append(start)
            table.counts[seat] = table.told[seat] = 0
            table.low[:, seat] = table.high[:, seat] = 0
        del self._left[: -self._most_left]

    def append(self, segment: int, seats: IntArray, entries: IntArray) -> IntArray:
        """Take cells for entries, ascending in each seat. Shapes: (rows,) each -> cells (parts, rows)."""
        table = self.tables[segment]
        cells = table.low.take(seats, axis=1) + entries
        there = cells < table.high.take(seats, axis=1)
        there &= self._free.take(cells, mode="clip")
        if np.count_nonzero(there) == there.size:
            self._free[cells] = False
        else:
            self._free[cells[there]] = False
            cells[~there] = self._elsewhere(int(there.size - there.sum()))
            table.leave_runs(seats[~there.all(0)])
        self._cells_in_use += cells.size
        table.put(seats, entries, cells)
        table.counts[seats] = entries + 1
        return cells

    def append_aliases(self, segment: int, seats: IntArray, entries: IntArray, cells: IntArray) -> None:
        """Add entries that read, at every layer of this segment, the last layer of another part's cells (rows,).

        They may stand before entries of the same pass that have cells of their own, which come first.
        """
        table = self.tables[segment]
        table.leave_runs(seats)
        # The flat slot number of a cell's last layer.
        table.put(seats, entries, (self.layout.layers_per_cell - 1) * self.num_cells + cells)
        table.aliased[seats, entries] = True
        table.counts[seats] = np.maximum(table.counts[seats], entries + 1)

    def cut(self, table: SegmentTables, seat: int, entries: int) -> None:
        """Free all but the first so many entries of a table."""
        count = int(table.counts[seat])
        if count <= entries:
            return
        cells, aliased = table.entries(seat)
        own = cells[:, entries:][:, ~aliased[entries:]]
        self._free[own] = True
        self._cells_in_use -= own.size
        table.aliased[seat, entries:count] = False
        table.counts[seat] = entries
        table.told[seat] = min(table.told[seat], entries)
        if not table.in_run[seat]:
            cells, aliased = table.entries(seat)
            run = table.low[:, seat, None] + np.arange(entries)
            table.set_in_run(seat, not aliased.any() and bool((cells == run).all()))

    def _elsewhere(self, count: int) -> IntArray:
        """Free cells, those that nobody prefers first; marked as taken."""
        cells = np.flatnonzero(self._free & self._unpreferred)[:count]
        if len(cells) < count:
            cells = np.concatenate((cells, np.flatnonzero(self._free & ~self._unpreferred)[: count - len(cells)]))
        assert len(cells) == count, "the pool is short of slots that were claimed"
        self._free[cells] = False
        return cells

    def _find_stretches(self, room: int) -> list[int]:
        """Where `room` cells in a row are free and nobody prefers them, which is marked: one for each cell of a token.

        Where other tables were if possible; fewer if there are no more.
        """
        wanted = self.layout.cells_per_token
        found: list[int] = []
        for _ in range(min(len(self._left), 2 * wanted)):
            if len(found) == wanted:
                break
            start = self._left.pop()
            if self._prefer(start, room):
                found.append(start)
        while len(found) < wanted and self._prefer(self._untouched, room):
            found.append(self._untouched)
            self._untouched += room
        if len(found) < wanted:
            taken = np.flatnonzero(~(self._free & self._unpreferred))
            edges = np.concatenate(([-1], taken, [self.num_cells]))
            wide = np.flatnonzero(np.diff(edges) > room)
            gaps = zip((edges[wide] + 1).tolist(), edges[wide + 1].tolist(), strict=True)
            starts = (start for first, end in gaps for start in range(first, end - room + 1, room))
            found += [start for start in islice(starts, wanted - len(found)) if self._prefer(start, room)]
        return found

    def _prefer(self, start: int, room: int) -> bool:
        """Mark a stretch as preferred, if all of it is free and nobody does."""
        stop = start + room
        if stop > self.num_cells or not (self._free[start:stop].all() and self._unpreferred[start:stop].all()):
            return False
        self._unpreferred[start:stop] = False
        return True

    def check_integrity(self, holders: Iterable[int] = ()) -> None:
        """Raise AssertionError unless each cell is free or in one table, and just the `holders` have any."""
        held = set(holders)
        seen = np.zeros(self.num_cells, dtype=np.int64)
        for table in self.tables:
            assert table.scattered == np.count_nonzero(~table.in_run)
            assert set(np.flatnonzero(table.counts).tolist()) <= held, "a request holds cells that it should not"
            for seat in held:
                np.add.at(seen, table.own_cells(seat), 1)
                assert not (table.in_run[seat] and table.entries(seat)[1].any()), "an alias lies in no run"
        assert (seen + self._free == 1).all(), "a cell is lost or in two tables"
        assert self._cells_in_use == int(seen.sum())
        assert self.in_use <= self.claimed <= self.capacity
