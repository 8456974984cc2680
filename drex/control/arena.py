"""Which rows of the hidden-state arena are taken, and by which pending position."""

from __future__ import annotations

import numpy as np

from drex.control.plan import IntArray


class ArenaRows:
    """Row numbers of the arena; a position holds one from its first pass until its last.

    Args:
        rows: how many the arena has.
        seats: requests that can hold some.
        room: positions that a request may reach.
    """

    def __init__(self, rows: int, seats: int, room: int) -> None:
        self.capacity = self.free = rows
        # A stack: the first `free` are nobody's.
        self._stack: IntArray = np.arange(rows)[::-1].copy()
        # One more than the row's number, 0 for none: zeros take no memory until something else is written.
        self._held: IntArray = np.zeros((seats, room), dtype=np.int64)

    def take(self, seats: IntArray, positions: IntArray) -> IntArray:
        """Give each position a row; the caller has seen that there are enough. Shapes: (rows,) each."""
        assert len(positions) <= self.free
        self.free -= len(positions)
        rows = self._stack[self.free : self.free + len(positions)].copy()
        self._held[seats, positions] = rows + 1
        return rows

    def rows(self, seats: IntArray, positions: IntArray) -> IntArray:
        """The rows that positions hold. Shapes: (rows,) each."""
        rows: IntArray = self._held[seats, positions] - 1
        return rows

    def release(self, seats: IntArray, positions: IntArray) -> None:
        """Take back the rows of positions, each held. Shapes: (rows,) each."""
        self._stack[self.free : self.free + len(positions)] = self.rows(seats, positions)
        self.free += len(positions)
        self._held[seats, positions] = 0

    def close(self, seat: int, stop: int, start: int = 0) -> None:
        """Take back all rows of a request's positions from `start` to `stop`."""
        positions = start + np.flatnonzero(self._held[seat, start:stop])
        self.release(np.full(len(positions), seat), positions)

    def check_integrity(self) -> None:
        """Raise AssertionError unless each row is free or held once."""
        rows = np.concatenate((self._stack[: self.free], self._held[self._held > 0] - 1))
        assert np.array_equal(np.sort(rows), np.arange(self.capacity)), "an arena row is lost or held twice"
