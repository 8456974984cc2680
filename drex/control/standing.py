"""Where each running request stands: before the first segment, in a rebatching buffer, or catching up.

A buffer is a list of seats: no states move in or out.
"""

from __future__ import annotations

from typing import NamedTuple

from drex.control.plan import BoolArray, IntArray
from drex.control.seats import Seats


class Standing(NamedTuple):
    """Where the requests stand that no outstanding pass holds. Arrays of seats are in no particular order.

    Attributes:
        pending: positions that have come to each segment and not passed it. Shape (segments, seats).
        decoding: whether a request has a token, and no prompt or replay still to pass the first segment. (seats,).
        ready: decoding requests with a row before the first segment, which may stand on tentative tokens.
        buffers: for each segment, decoding requests whose first row that is not settled waits there; empty for the
            first.
        urgent: for each segment, requests that catch up and have positions there: prompts, replays, rows of a first
            token.
        owed: for each segment, rows of decoding requests that are to pass there next beside those in the buffer.
    """

    pending: IntArray
    decoding: BoolArray
    ready: IntArray
    buffers: list[IntArray]
    urgent: list[IntArray]
    owed: list[int]

    @classmethod
    def of(cls, seats: Seats) -> Standing:
        """Look at all seats."""
        reached, settled = seats.reached, seats.settled
        pending, decoding = reached[:-1] - reached[1:], seats.idle & seats.decodes
        starts = decoding & (pending[0] > 0)
        if seats.having["drafting"]:
            starts &= ~seats.ended
        ready = starts.nonzero()[0]
        nobody = ready[:0]
        # The first row that is not settled has come to a segment where as many positions have as are settled. It is
        # decided, and settled, when it has passed the last.
        came = decoding & (reached[1:-1] >= settled)
        if seats.segments > 2:
            came[:-1] &= ~came[1:]
        buffers = [waits.nonzero()[0] for waits in came]
        urgent = [nobody] * seats.segments
        if seats.catching_up:
            catching_up = seats.idle ^ decoding
            urgent = [(catching_up & (rows > 0)).nonzero()[0] for rows in pending]
        pending_there = (pending @ decoding).tolist()
        further = [rows - len(waits) for rows, waits in zip(pending_there[1:], buffers, strict=True)]
        return cls(pending, decoding, ready, [nobody, *buffers], urgent, [0, *further])

    def fills(self, segment: int) -> int:
        """Rows that the requests in a buffer owe there beside their live rows."""
        waiting = self.buffers[segment]
        return int(self.pending[segment][waiting].sum()) - len(waiting) if len(waiting) else 0
