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


class SegmentTable:
    """Entries of one request at one segment, in order of position: own cells, aliases of another slot, or absent.

    Args:
        parts: cells an own entry has.
        room: positions the request may reach.
    """

    def __init__(self, parts: int, room: int) -> None:
        self.cells = np.empty((parts, room), dtype=np.int64)
        self.aliased = np.zeros(room, dtype=np.bool_)
        self.preferred: list[tuple[int, int]] = []
        self.count = 0
        self.scattered = False

    def append(self, cells: IntArray) -> None:
        """Add own entries, in order of position. cells: (parts, positions)."""
        added = cells.shape[1]
        before = self.cells[:, self.count - 1 : self.count] if self.count else cells[:, :1] - 1
        steps = np.diff(cells, axis=1, prepend=before)
        self.scattered = self.scattered or bool((steps != 1).any())
        self.cells[:, self.count : self.count + added] = cells
        self.count += added

    def append_alias(self, slot: int) -> None:
        """Add an entry that reads another layer's slot at every layer of this segment."""
        self.cells[:, self.count] = slot
        self.aliased[self.count] = True
        self.scattered = True
        self.count += 1

    def context(self) -> tuple[Context, ...]:
        """What attention reads, one for each part."""
        if not self.scattered:
            return tuple(Run(int(part[0]) if self.count else 0, self.count) for part in self.cells)
        aliased = self.aliased[: self.count].copy()
        return tuple(Scattered(part[: self.count].copy(), aliased) for part in self.cells)

    def own_cells(self) -> IntArray:
        """All cells this table holds, flat."""
        own: IntArray = self.cells[:, : self.count][:, ~self.aliased[: self.count]].reshape(-1)
        return own


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
        self._free: BoolArray = np.ones(self.num_cells, dtype=np.bool_)
        self._unpreferred: BoolArray = np.ones(self.num_cells, dtype=np.bool_)
        self._cells_in_use = 0
        self._tables: dict[str, tuple[SegmentTable, ...]] = {}

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
        tables = tuple(SegmentTable(self.layout.parts(segment), room) for segment in range(len(self.layout.lengths)))
        for table in tables:
            for _ in range(table.cells.shape[0]):
                start = self._find_stretch(room)
                table.preferred.append((start, start + room if start >= 0 else start))
                if start >= 0:
                    self._unpreferred[start : start + room] = False
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

    def extend(self, table: SegmentTable, positions: int) -> IntArray:
        """Take cells for `positions` more entries and append them. Returns (parts, positions)."""
        cells = np.stack([self._take(table, part, positions) for part in range(table.cells.shape[0])])
        table.append(cells)
        return cells

    def slot(self, cell: int) -> int:
        """The flat slot number of a cell's last layer: what an alias of an exit layer names."""
        return (self.layout.layers_per_cell - 1) * self.num_cells + cell

    def _take(self, table: SegmentTable, part: int, positions: int) -> IntArray:
        low, high = table.preferred[part]
        start = low
        if table.count:
            last = int(table.cells[part, table.count - 1])
            start = last + 1 if not table.aliased[table.count - 1] else low
        stop = start + positions
        if 0 <= low <= start and stop <= high and self._free[start:stop].all():
            cells = np.arange(start, stop)
        else:
            cells = np.flatnonzero(self._free & self._unpreferred)[:positions]
            if len(cells) < positions:
                cells = np.flatnonzero(self._free)[:positions]
        assert len(cells) == positions, "the pool is short of slots that were claimed"
        self._free[cells] = False
        self._cells_in_use += positions
        return cells

    def _find_stretch(self, room: int) -> int:
        """The first `room` cells in a row that are free and nobody prefers, or -1."""
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
