"""What could be earned now, solved in the background: θ*, ideal and full depth, and the decisions for two exit points.

It is solved in a thread of its own from a copy of the cost model, and takes effect a fixed number of passes after it
was asked for, so that a run can be replayed. What was solved for other loads is kept: load comes and goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

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


class _Asked(NamedTuple):
    """At which pass, with which exit rates, and for how many."""

    at: int
    exit_rates: tuple[float, ...]
    decoding: int

    def stale(self, pass_number: int, exit_rates: Sequence[float]) -> bool:
        """Whether it should be solved again, at whatever load."""
        moved = any(abs(a - b) > RATES_MOVED for a, b in zip(exit_rates, self.exit_rates, strict=True))
        return moved or pass_number - self.at >= LIFETIME

    def near(self, decoding: int) -> bool:
        """Whether the load is about this."""
        return abs(decoding - self.decoding) <= LOAD_MOVED * self.decoding


class Outlook:
    """The yardstick of the present load, or of the nearest one that was solved.

    Args:
        cost: of passes.
        kv_fill: what the layers that a token skipped cost later.
        most_owed: fills that the engine lets be owed.
    """

    def __init__(self, cost: CostModel, kv_fill: str, most_owed: int = MOST_OWED) -> None:
        self._cost, self._kv_fill, self._most_owed = cost, kv_fill, most_owed
        self._solver: ThreadPoolExecutor | None = None
        self._under_way: tuple[_Asked, Future[Yardstick]] | None = None
        self._solved: dict[int, tuple[_Asked, Yardstick]] = {}
        self.yardstick: Yardstick | None = None

    def tick(
        self, pass_number: int, decoding: int, exit_rates: Sequence[float], context: float, *, used: bool = True
    ) -> None:
        """Use what is due, or ask for what is stale. Called every so many passes.

        Args:
            pass_number: of the next pass.
            decoding: requests.
            exit_rates: at each exit point.
            context: mean K/V entries of a request.
            used: whether decisions are read from it; what is stale will do where not, since solving takes a core.
        """
        if self._under_way is not None and pass_number >= self._under_way[0].at + DELAY:
            asked, future = self._under_way
            self._under_way, self._solved[_size(asked.decoding)] = None, (asked, future.result())
        if not decoding:
            return
        wanted = True
        if self._solved:

            def order(each: tuple[_Asked, Yardstick]) -> tuple[bool, bool, float]:
                near = each[0].near(decoding)
                off = abs(math.log(decoding / each[0].decoding))
                return not near, near and each[0].stale(pass_number, exit_rates), off

            asked, self.yardstick = min(self._solved.values(), key=order)
            wanted = not asked.near(decoding) or (used and asked.stale(pass_number, exit_rates))
        if wanted and self._under_way is None:
            self._solver = self._solver or ThreadPoolExecutor(1, thread_name_prefix="drex-outlook")
            asked, cost = _Asked(pass_number, tuple(exit_rates), decoding), self._cost.copy()
            solve = partial(measure, grain=GRAIN, most_owed=self._most_owed, last=self.yardstick)
            future = self._solver.submit(solve, cost, asked.exit_rates, decoding, context, self._kv_fill)
            self._under_way = asked, future

    def choose(self, ready: int, live: Sequence[int]) -> int | None:
        """The segment to run, by the requests that are ready and those that wait at each exit point.

        None where it isn't solved for about as many, or what is solved names a segment that nothing waits for.
        """
        found, total = self.yardstick, ready + sum(live)
        if found is None or abs(found.in_flight - total) > LOAD_MOVED * found.in_flight:
            return None
        if found.one_exit is not None and ready and live[0]:
            most = len(found.one_exit.flush) - 1
            return int(found.one_exit.flush[min(most - 1, max(1, round(live[0] * most / total)))])
        if found.two_exits is None:
            return None
        solved, (first, second) = found.two_exits, live
        units = solved.units
        one, two = (max(1, round(count * units / total)) if count else 0 for count in (first, second))
        while one + two > units - (ready > 0):
            one, two = (one - 1, two) if one > two else (one, two - 1)
        segment = solved.choice[one, two]
        return segment if (ready, first, second)[segment] else None


def _size(decoding: int) -> int:
    return round(math.log(decoding) / math.log(1 + LOAD_MOVED))
