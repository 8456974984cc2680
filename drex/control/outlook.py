"""What could be earned now, solved in the background: θ*, ideal and full depth, and the decisions for two exit points.

It is solved in a thread of its own from a copy of the cost model, and takes effect a fixed number of passes after it
was asked for, so that a run can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from drex.control.cost import CostModel
from drex.control.yardstick import MOST_OWED, Yardstick, measure

GRAIN = 32
"""Requests that two exit points are solved for; more are counted in units of several, which costs some 0.1 %."""
DELAY = 16
"""Passes between asking and using, at least."""
LIFETIME = 256
"""Passes after which it is solved again, if nothing calls for that before."""
LOAD_MOVED, RATES_MOVED = 0.25, 0.1
"""What calls for it: requests that decode have changed by such a share, or an exit rate by so much."""


class Outlook:
    """The yardstick of the present load.

    Args:
        cost: of passes.
        kv_fill: what the layers that a token skipped cost later.
        most_owed: fills that the engine lets be owed.
    """

    def __init__(self, cost: CostModel, kv_fill: str, most_owed: int = MOST_OWED) -> None:
        self._cost, self._kv_fill, self._most_owed = cost, kv_fill, most_owed
        self._solver: ThreadPoolExecutor | None = None
        self._asked: tuple[int, Future[Yardstick]] | None = None
        self._made_for, self._made_at = 0, 0
        self._made_with: Sequence[float] = ()
        self.yardstick: Yardstick | None = None

    def tick(self, pass_number: int, decoding: int, exit_rates: Sequence[float], context: float) -> None:
        """Use what is due, or ask for what is stale. Called every so many passes."""
        if self._asked is not None:
            due, future = self._asked
            if pass_number >= due:
                self.yardstick, self._asked = future.result(), None
            return
        moved = abs(decoding - self._made_for) > LOAD_MOVED * self._made_for
        moved |= any(abs(a - b) > RATES_MOVED for a, b in zip(exit_rates, self._made_with, strict=False))
        if decoding and (moved or pass_number - self._made_at >= LIFETIME):
            self._made_for, self._made_at, self._made_with = decoding, pass_number, exit_rates
            self._solver = self._solver or ThreadPoolExecutor(1, thread_name_prefix="drex-outlook")
            settings = {"grain": GRAIN, "most_owed": self._most_owed}
            future = self._solver.submit(
                measure, self._cost.copy(), tuple(exit_rates), decoding, context, self._kv_fill, **settings
            )
            self._asked = pass_number + DELAY, future

    def choose(self, ready: int, first: int, second: int) -> int | None:
        """The segment to run with two exit points, by the requests that stand before each.

        None where nothing is solved yet, or what is solved names a segment that nothing waits for.
        """
        if self.yardstick is None or self.yardstick.two_exits is None:
            return None
        solved = self.yardstick.two_exits
        units, total = solved.units, ready + first + second
        one, two = (max(1, round(count * units / total)) if count else 0 for count in (first, second))
        while one + two > units - (ready > 0):
            one, two = (one - 1, two) if one > two else (one, two - 1)
        segment = solved.choice[one, two]
        return segment if (ready, first, second)[segment] else None
