"""Which rows of the hidden-state arena are taken, and by which pending position."""

from __future__ import annotations

import numpy as np

from drex.control.plan import IntArray


class ArenaRows:
    """Row numbers of the arena; a position holds one from its first pass until its last.

    A position of a request has the place `seat * room + position`.

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
        self._held: IntArray = np.zeros(seats * room, dtype=np.int64)
        self._room = room

    def take(self, places: IntArray) -> IntArray:
        """Give each place a row; the caller has seen that there are enough. Shape of both: (rows,)."""
        assert len(places) <= self.free
        self.free -= len(places)
        rows = self._stack[self.free : self.free + len(places)].copy()
        self._held[places] = rows + 1
        return rows

    def rows(self, places: IntArray) -> IntArray:
        """The rows that places hold. Shape of both: (rows,)."""
        rows: IntArray = self._held[places] - 1
        return rows

    def release(self, places: IntArray) -> None:
        """Take back the rows of places, each held. Shape: (rows,)."""
        self._stack[self.free : self.free + len(places)] = self.rows(places)
        self.free += len(places)
        self._held[places] = 0

    def close(self, seat: int, stop: int, start: int = 0) -> None:
        """Take back all rows of a request's positions from `start` to `stop`."""
        first = seat * self._room + start
        self.release(first + self._held[first : first + stop - start].nonzero()[0])

    def check_integrity(self) -> None:
        """Raise AssertionError unless each row is free or held once."""
        rows = np.concatenate((self._stack[: self.free], self._held[self._held > 0] - 1))
        assert np.array_equal(np.sort(rows), np.arange(self.capacity)), "an arena row is lost or held twice"
