"""Where each running request stands: before the first segment, in a rebatching buffer, or catching up.

A buffer is a list of seats: no states move in or out.
"""

from __future__ import annotations

from typing import NamedTuple

from drex.control.plan import BoolArray, IntArray, total
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
        # The first row that is not settled has come to a segment if as many positions have as are settled.
        waits, buffers, owed = decoding, [], []
        for segment in range(seats.segments - 1, 0, -1):
            came = waits & (reached[segment] >= settled)
            waits = waits ^ came
            buffers.append(came.nonzero()[0])
            owed.append(total(pending[segment][decoding]) - len(buffers[-1]))
        if seats.having["drafting"]:
            waits = decoding & (pending[0] > 0) & ~seats.ended
        ready = waits.nonzero()[0]
        nobody = ready[:0]
        urgent = [nobody] * seats.segments
        if seats.catching_up:
            catching_up = seats.idle ^ decoding
            urgent = [(catching_up & (rows > 0)).nonzero()[0] for rows in pending]
        return cls(pending, decoding, ready, [nobody, *reversed(buffers)], urgent, [0, *reversed(owed)])

    def fills(self, segment: int) -> int:
        """Rows that the requests in a buffer owe there beside their live rows."""
        waiting = self.buffers[segment]
        return total(self.pending[segment][waiting]) - len(waiting) if len(waiting) else 0
