"""Run-ahead: tokens that are taken tentatively while their row waits, what stands on them, and what becomes of it.

A row that an exit point is not sure of takes that head's token all the same, and the request goes on from it. Rows
behind it that are sure are decided, but held: what they stand on is not. When a deeper head is asked about the row, its
token either agrees, and what was held follows from it up to the next open row; or it differs, and everything behind the
row is taken back. Tokens are drawn under the same noise at every head, so that equality is all there is to check.

Invariants: `request.context` is `request.tokens` and one token for each entry of `request.ahead`; the first entry is
open, and entries without a record are open rows.
"""

from __future__ import annotations

from typing import Any

from drex.control.memory.placement import Placement
from drex.control.request import Ahead, Request, TokenRecord
from drex.control.run_ahead.acceptance import Acceptance, Compounding
from drex.control.seats import Seats


class Drafts:
    """What is not settled of the running requests.

    Args:
        seats: of the requests.
        placement: what rows behind a wrong token give back.
        most: open rows that a request may have.

    Attributes:
        acceptance: of tentative tokens, learnt; compounding: of those that stand on several, likewise.
        drafted: tokens taken tentatively; rolled_back: tokens taken back, held ones included.
    """

    def __init__(self, seats: Seats, placement: Placement, most: int) -> None:
        self.seats, self.placement, self.most = seats, placement, most
        self.acceptance = Acceptance(seats.segments - 1)
        self.compounding = Compounding(most)
        self.drafted = self.rolled_back = 0

    def go_on(self, request: Request, position: int, token: int, exit_index: int, confidence: float) -> None:
        """An exit point is not sure of the row at a position, the request's last: go on from its token, if that may be.

        A token that would end the request, or whose row would never run, is not worth having.
        """
        number = position + 2 - len(request.prompt)
        if number >= request.params.max_tokens or request.ends(token, number):
            return
        ahead = request.ahead
        if len(ahead) < self.most or sum([entry.record is None for entry in ahead]) < self.most:
            self.drafted += 1
            self._append(request, token, Ahead(None, exit_index, confidence))

    def hold(self, request: Request, token: int, record: TokenRecord) -> None:
        """A row that stands on others has decided its token; it becomes one when they are settled."""
        self._append(request, token, Ahead(record, 0, 0.0))
        number = len(request.context) - len(request.prompt)
        if number >= request.params.max_tokens or request.ends(token, number):
            self.seats.end(request)

    def verify(self, request: Request, position: int, token: int, record: TokenRecord | None) -> bool:
        """A deeper head said a row's token, for good if with a record. Returns whether what stands on it holds."""
        context, ahead = request.context, request.ahead
        at = position + 1 - len(context) + len(ahead)
        agrees = context[position + 1] == token
        if record is not None:
            entry = ahead[at]
            self.acceptance.observe(entry.exit_index, entry.confidence, agrees)
            if agrees:
                entry.record = record
        if agrees:
            return True
        seat = request.seat
        assert seat is not None
        self.rolled_back += len(request.ahead) - at
        for each in request.ahead[at:]:
            self.compounding.observe(each.open_rows, each.chance, False)
        request.take_back(position + 1)
        self.placement.roll_back(seat, position + 1)
        return False

    def settle(self, request: Request) -> int:
        """Take over what stands on nothing open any more; returns how many tokens. A token may end the request."""
        settled, ahead = 0, request.ahead
        while ahead and (record := ahead[0].record) is not None:
            first = request.settle_draft()
            self.compounding.observe(first.open_rows, first.chance, True)
            request.take(record)
            settled += 1
            number = len(request.records)
            if number >= request.params.max_tokens or request.ends(record.token_id, number):
                break
        if settled:
            self.seats.settle_drafts(request, settled)
            self.weigh(request)
        return settled

    def count_afresh(self) -> None:
        """Reports are of what comes from now on; what was learnt stays."""
        self.drafted = self.rolled_back = 0
        self.acceptance.count_afresh()

    def report(self) -> dict[str, Any]:
        """Counts, and how well acceptance is known."""
        return {"drafted": self.drafted, "rolled_back": self.rolled_back, **self.acceptance.report()}

    def _append(self, request: Request, token: int, entry: Ahead) -> None:
        self.seats.draft(request, token)
        request.draft(token, entry)
        entry.open_rows, entry.chance = self.weigh(request)

    def weigh(self, request: Request) -> tuple[int, float]:
        """Note how likely the request's next row is to be of use: all that it stands on must be right.

        Returns how many open rows that is, and the product of their chances.
        """
        count, chance = self.acceptance.of_all(request.ahead) if request.ahead else (0, 1.0)
        self.seats.weigh(request, self.compounding.chance(count, chance))
        return count, chance
