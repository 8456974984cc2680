"""Where each running request stands that is in no outstanding pass, kept up to date as requests move.

A request that decodes is `ready` before segment 0, or its live row waits in one of the `buffers`. Prompts, replays and
rows of a first token are `urgent` at every segment where they have pending positions.
"""

from __future__ import annotations

from drex.control.buffer import RebatchBuffer
from drex.request import Request


class Standing:
    """Requests by where they stand.

    Attributes:
        ready: decoding, before segment 0.
        buffers: for each segment; the first stays empty.
        urgent: for each segment.
        owed: for each segment, rows of decoding requests whose token is decided and that owe K/V there next.
    """

    def __init__(self, segments: int) -> None:
        self.ready: dict[str, Request] = {}
        self.buffers = [RebatchBuffer(segment) for segment in range(segments)]
        self.urgent: list[dict[str, Request]] = [{} for _ in range(segments)]
        self.owed = [0] * segments

    def enter(self, request: Request, pass_number: int) -> bool:
        """Take in a request that no pass holds. Returns whether its live row has just come to a buffer."""
        frontiers, last = request.frontiers, len(request.tokens) - 1
        if frontiers[0] < last or last + 1 == len(request.prompt):
            request.stands_at = None
            for segment, urgent in enumerate(self.urgent):
                if request.pending(segment):
                    urgent[request.request_id] = request
            return False
        if frontiers[-1] < last:
            self._count(frontiers, last, 1)
        if frontiers[0] == last:
            request.stands_at = 0
            self.ready[request.request_id] = request
            return False
        segment = request.stands_at = sum([frontier > last for frontier in frontiers])
        new = request.waits_since is None or request.waits_since[0] != segment
        if new:
            request.waits_since = segment, pass_number
        self.buffers[segment].add(request)
        return new

    def leave(self, request: Request) -> None:
        """Take out a request, for a pass or for good; called before anything of it changes."""
        if request.stands_at is None:
            for urgent in self.urgent:
                urgent.pop(request.request_id, None)
            return
        frontiers, last = request.frontiers, len(request.tokens) - 1
        if frontiers[-1] < last:
            self._count(frontiers, last, -1)
        if request.stands_at == 0:
            del self.ready[request.request_id]
        else:
            self.buffers[request.stands_at].discard(request)

    def _count(self, frontiers: list[int], last: int, sign: int) -> None:
        """Add or take away what a request owes. Positions before `last` are decided."""
        before = min(last, frontiers[0])
        for segment in range(1, len(frontiers)):
            here = min(last, frontiers[segment])
            self.owed[segment] += sign * (before - here)
            before = here
