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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from drex.control.plan import BoolArray, Context, IntArray, Run, Scattered


@dataclass(frozen=True)
class SlotLayout:
    """How segments map to cells.

    Attributes:
        lengths: layers of each segment.
    """

    lengths: tuple[int, ...]

    @property
    def layers_per_cell(self) -> int:
        return math.gcd(*self.lengths)

    def parts(self, segment: int) -> int:
        return self.lengths[segment] // self.layers_per_cell

    @property
    def cells_per_token(self) -> int:
        return sum(self.lengths) // self.layers_per_cell


MOST_LEFT = 1024
"""Starts of stretches that tables have left, to be tried first by new ones."""


class SegmentTable:
    """Entries of one request at one segment, in order of position: own cells, aliases of another slot, or absent.

    While the cells of each part lie in one run, only their starts are kept.

    Args:
        preferred: for each part, the stretch [low, high) of cells to grow in; low is -1 where there is none.
        room: positions the request may reach.
    """

    def __init__(self, preferred: Sequence[tuple[int, int]], room: int) -> None:
        self.preferred = tuple(preferred)
        self.count = 0
        self._starts = [low for low, _ in preferred]
        self._room = room
        self._cells: IntArray | None = None
        self._aliased: BoolArray = np.zeros(0, dtype=np.bool_)

    @property
    def parts(self) -> int:
        return len(self.preferred)

    @property
    def scattered(self) -> bool:
        """Whether the entries are not in one run a part."""
        return self._cells is not None

    @property
    def cells(self) -> IntArray:
        """Cells by part and entry, or slots where `aliased`. Shape (parts, count)."""
        if self._cells is not None:
            return self._cells[:, : self.count]
        return np.array(self._starts, dtype=np.int64)[:, None] + np.arange(self.count)

    @property
    def aliased(self) -> BoolArray:
        """Which entries are aliases. Shape (count,)."""
        return self._aliased[: self.count] if self.scattered else np.zeros(self.count, dtype=np.bool_)

    def cell(self, part: int, entry: int) -> int:
        """The cell of one entry."""
        return self._starts[part] + entry if self._cells is None else int(self._cells[part, entry])

    def next_cell(self, part: int) -> int:
        """Where the run of a part would go on; -1 where it can't."""
        if self._cells is None:
            start = self._starts[part]
            return start + self.count if start >= 0 else -1
        last = self.count - 1
        if last < 0 or self._aliased[last]:
            return self.preferred[part][0]
        return int(self._cells[part, last]) + 1

    def room_ahead(self, positions: int) -> tuple[range, ...] | None:
        """Where each part's run would go on for so many positions; None where one of them can't."""
        if self._cells is not None:
            return None
        runs = []
        for start, (low, high) in zip(self._starts, self.preferred, strict=True):
            begin = start + self.count
            if not 0 <= low <= begin <= high - positions:
                return None
            runs.append(range(begin, begin + positions))
        return tuple(runs)

    def append(self, cells: Sequence[Sequence[int]]) -> None:
        """Add own entries, in order of position; for each part as many cells."""
        added = len(cells[0])
        if self._cells is None:
            if not self.count:
                self._starts = [part[0] for part in cells]
            if all(_goes_on(part, self._starts[i] + self.count) for i, part in enumerate(cells)):
                self.count += added
                return
        held = self._scatter()
        held[:, self.count : self.count + added] = cells
        self.count += added

    def append_alias(self, slot: int) -> None:
        """Add an entry that reads another layer's slot at every layer of this segment."""
        self._scatter()[:, self.count] = slot
        self._aliased[self.count] = True
        self.count += 1

    def _scatter(self) -> IntArray:
        """Keep every cell from now on."""
        if self._cells is None:
            held = np.empty((self.parts, self._room), dtype=np.int64)
            held[:, : self.count] = self.cells
            self._cells, self._aliased = held, np.zeros(self._room, dtype=np.bool_)
        return self._cells

    def context(self) -> tuple[Context, ...]:
        """What attention reads, one for each part."""
        if self._cells is None:
            return tuple([Run(start, self.count) for start in self._starts])
        aliased = self.aliased.copy()
        return tuple(Scattered(part.copy(), aliased) for part in self.cells)

    def own_cells(self) -> IntArray:
        """All cells this table holds, flat."""
        own: IntArray = self.cells[:, ~self.aliased].reshape(-1)
        return own


def _goes_on(cells: Sequence[int], start: int) -> bool:
    """Whether cells are consecutive from `start` on."""
    if isinstance(cells, range):
        return cells.start == start
    return list(cells) == list(range(start, start + len(cells)))


class SlotPool:
    """All slots, and who may take how many.

    Args:
        layout: of the segments.
        tokens: how many tokens fit at every layer.
    """

    def __init__(self, layout: SlotLayout, tokens: int) -> None:
        self.layout = layout
        self.num_cells = tokens * layout.cells_per_token
        self.claimed = 0
        # One byte a cell, seen two ways: single cells are quick to reach as bytes, many as an array.
        self._free_bytes = bytearray(b"\1") * self.num_cells
        self._free: BoolArray = np.frombuffer(self._free_bytes, dtype=np.bool_)
        self._unpreferred: BoolArray = np.ones(self.num_cells, dtype=np.bool_)
        self._cells_in_use = 0
        self._tables: dict[str, tuple[SegmentTable, ...]] = {}
        self._left: list[int] = []

    @property
    def capacity(self) -> int:
        """Slots there are."""
        return self.num_cells * self.layout.layers_per_cell

    @property
    def in_use(self) -> int:
        """Slots that hold K/V."""
        return self._cells_in_use * self.layout.layers_per_cell

    def fits(self, slots: int) -> bool:
        """Whether `slots` more can be claimed."""
        return self.claimed + slots <= self.capacity

    def claim(self, slots: int) -> None:
        """Count `slots` (negative: fewer) as spoken for; `fits` was asked before."""
        self.claimed += slots
        assert 0 <= self.claimed <= self.capacity, f"claimed {self.claimed} of {self.capacity} slots"

    def open(self, request_id: str, room: int) -> tuple[SegmentTable, ...]:
        """Give a request its tables, with stretches of the pool where `room` positions could lie in one run."""
        assert request_id not in self._tables
        segments = range(len(self.layout.lengths))
        tables = tuple(SegmentTable(self._prefer(self.layout.parts(segment), room), room) for segment in segments)
        self._tables[request_id] = tables
        return tables

    def close(self, request_id: str) -> None:
        """Free everything a request holds."""
        for table in self._tables.pop(request_id):
            cells = table.own_cells()
            assert not self._free[cells].any()
            self._free[cells] = True
            self._cells_in_use -= len(cells)
            for start, stop in table.preferred:
                self._unpreferred[start:stop] = True
                self._left.append(start)
            del self._left[:-MOST_LEFT]

    def _prefer(self, parts: int, room: int) -> list[tuple[int, int]]:
        """A stretch of `room` cells for each part, (-1, -1) where there is none; marked as preferred."""
        chosen = []
        for _ in range(parts):
            start = self._find_stretch(room)
            chosen.append((start, start + room if start >= 0 else start))
            if start >= 0:
                self._unpreferred[start : start + room] = False
        return chosen

    def extend(self, table: SegmentTable, positions: int) -> tuple[Sequence[int], ...]:
        """Take cells for `positions` more entries and append them. Returns them, for each part as many."""
        runs = table.room_ahead(positions)
        free = self._free_bytes
        if runs is not None and all(free.find(0, run.start, run.stop) < 0 for run in runs):
            for run in runs:
                if positions == 1:
                    free[run.start] = 0
                else:
                    self._free[run.start : run.stop] = False
            self._cells_in_use += positions * len(runs)
            table.count += positions
            return runs
        cells = tuple([self._take(table, part, positions) for part in range(table.parts)])
        table.append(cells)
        return cells

    def slot(self, cell: int) -> int:
        """The flat slot number of a cell's last layer: what an alias of an exit layer names."""
        return (self.layout.layers_per_cell - 1) * self.num_cells + cell

    def _take(self, table: SegmentTable, part: int, positions: int) -> Sequence[int]:
        low, high = table.preferred[part]
        start = table.next_cell(part)
        stop = start + positions
        self._cells_in_use += positions
        if 0 <= low <= start and stop <= high and self._free_bytes.find(0, start, stop) < 0:
            if positions == 1:
                self._free_bytes[start] = 0
            else:
                self._free[start:stop] = False
            return range(start, stop)
        cells = np.flatnonzero(self._free & self._unpreferred)[:positions]
        if len(cells) < positions:
            cells = np.flatnonzero(self._free)[:positions]
        assert len(cells) == positions, "the pool is short of slots that were claimed"
        self._free[cells] = False
        taken: list[int] = cells.tolist()
        return taken

    def _find_stretch(self, room: int) -> int:
        """`room` cells in a row that are free and nobody prefers, where another table was if possible; or -1."""
        while self._left:
            start = self._left.pop()
            stop = start + room
            inside = start >= 0 and stop <= self.num_cells
            if inside and self._free[start:stop].all() and self._unpreferred[start:stop].all():
                return start
        taken = np.flatnonzero(~(self._free & self._unpreferred))
        edges = np.concatenate(([-1], taken, [self.num_cells]))
        starts = np.flatnonzero(np.diff(edges) > room)
        return int(edges[starts[0]]) + 1 if len(starts) else -1

    def check_integrity(self, holders: Iterable[str] = ()) -> None:
        """Raise AssertionError unless each cell is free or in one table, and just the `holders` have tables."""
        seen = np.zeros(self.num_cells, dtype=np.int64)
        for tables in self._tables.values():
            for table in tables:
                np.add.at(seen, table.own_cells(), 1)
        assert (seen + self._free == 1).all(), "a cell is lost or in two tables"
        assert self._cells_in_use == int(seen.sum())
        assert self.in_use <= self.claimed <= self.capacity
        assert set(self._tables) == set(holders), "a request holds tables that it should not, or has none"
