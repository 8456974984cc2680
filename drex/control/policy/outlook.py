"""What could be earned now, solved beside the passes: θ*, ideal and full depth, and the decisions for two exit points.

It is solved from a copy of the cost model, and takes effect at a fixed number of passes after it was asked for, or as
soon after that as it is solved: planning never waits for it. What was solved for other loads is kept: load comes and
goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from drex.control.constants import (
    EXIT_RATE_MOVED,
    LOAD_MOVED_SHARE,
    MOST_OWED_ROWS,
    SOLUTION_LIFETIME_PASSES,
    SOLVE_DELAY_PASSES,
    TWO_EXITS_UNITS,
)
from drex.control.cost.model import CostModel
from drex.control.policy.yardstick import Yardstick, measure


class _Asked(NamedTuple):
    """At which pass, with which exit rates, and for how many."""

    at: int
    exit_rates: tuple[float, ...]
    decoding: int

    def stale(self, pass_number: int, exit_rates: Sequence[float]) -> bool:
        """Whether it should be solved again, at whatever load."""
        moved = any(abs(a - b) > EXIT_RATE_MOVED for a, b in zip(exit_rates, self.exit_rates, strict=True))
        return moved or pass_number - self.at >= SOLUTION_LIFETIME_PASSES

    def near(self, decoding: int) -> bool:
        """Whether the load is about this."""
        return abs(decoding - self.decoding) <= LOAD_MOVED_SHARE * self.decoding


class Pending(Protocol):
    """A yardstick that was asked for."""

    def at(self, pass_number: int) -> Yardstick | None:
        """What was found, or None where it is not to be used yet at this pass. Never waits."""


class Solving(Protocol):
    """Where yardsticks are computed; one at a time is asked for."""

    def submit(self, solve: Callable[[], Yardstick]) -> Pending:
        """Have `solve` called, here or on another thread."""


class Solved(NamedTuple):
    """A yardstick that is there."""

    yardstick: Yardstick

    def at(self, pass_number: int) -> Yardstick | None:
        return self.yardstick


class InPlace:
    """Solves at once, which holds up the pass that is planned: for virtual time, in which that takes none."""

    def submit(self, solve: Callable[[], Yardstick]) -> Pending:
        return Solved(solve())


class Outlook:
    """The yardstick of the present load, or of the nearest one that was solved.

    Args:
        cost: of passes.
        kv_fill: what the layers that a token skipped cost later.
        most_owed: fills that the engine lets be owed.
        solving: where yardsticks are computed.
    """

    def __init__(
        self, cost: CostModel, kv_fill: str, most_owed: int = MOST_OWED_ROWS, solving: Solving | None = None
    ) -> None:
        self._cost, self._kv_fill, self._most_owed = cost, kv_fill, most_owed
        self.solving: Solving = solving or InPlace()
        self._under_way: tuple[_Asked, Pending] | None = None
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
        if self._under_way is not None and pass_number >= self._under_way[0].at + SOLVE_DELAY_PASSES:
            asked, pending = self._under_way
            found = pending.at(pass_number)
            if found is not None:
                self._under_way, self._solved[_size(asked.decoding)] = None, (asked, found)
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
            asked, cost = _Asked(pass_number, tuple(exit_rates), decoding), self._cost.copy()
            solve = partial(measure, grain=TWO_EXITS_UNITS, most_owed=self._most_owed, last=self.yardstick)
            solve = partial(solve, cost, asked.exit_rates, decoding, context, self._kv_fill)
            self._under_way = asked, self.solving.submit(solve)

    def choose(self, ready: int, live: Sequence[int]) -> int | None:
        """The segment to run, by the requests that are ready and those that wait at each exit point.

        None where it isn't solved for about as many, or what is solved names a segment that nothing waits for.
        """
        found, total = self.yardstick, ready + sum(live)
        if found is None or abs(found.in_flight - total) > LOAD_MOVED_SHARE * found.in_flight:
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
    return round(math.log(decoding) / math.log(1 + LOAD_MOVED_SHARE))
