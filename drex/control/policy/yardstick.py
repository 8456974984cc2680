"""How fast rebatching could be: the optimum θ*, the ideal, and full depth, from costs and exit rates.

One exit point is solved exactly at any N, two up to a number of requests, or in units of several. Rates are tokens a
second, times are seconds, and arrays are indexed by a count of requests, 0 … N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from drex.control.constants import (
    LEAST_EXIT_RATE,
    MOST_OWED_ROWS,
    OWED_MOST_FILLS,
    OWED_POINTS,
    OWED_TAIL_DEVIATIONS,
    TWO_EXITS_MOST_REQUESTS,
)
from drex.control.cost.model import CostModel
from drex.control.plan import FloatArray
from drex.control.policy.solver import OneExit, TwoExits, solve_one_exit, solve_two_exits


@dataclass(frozen=True)
class Yardstick:
    """What N decoding requests could get, in tokens a second; `optimal` is None where it is not solved."""

    in_flight: int
    optimal: float | None
    ideal: float
    full: float
    one_exit: OneExit | None = None
    two_exits: TwoExits | None = None

    def worth(self, waiting: Sequence[int]) -> tuple[float, ...] | None:
        """Worth in tokens of running each segment, up to a constant, by the requests that wait at each exit point.

        None where it is not solved for single requests.
        """
        if self.one_exit is not None:
            return 0.0, float(self.one_exit.advantage[waiting[0]])
        if self.two_exits is not None and self.two_exits.units == self.in_flight:
            return self.two_exits.worth[waiting[0], waiting[1]]
        return None

    def gain(self, ready: int, waiting: Sequence[int]) -> float | None:
        """Worth in tokens of flushing a buffer less that of going on with the ready requests.

        None where not both are possible, or where it is not solved for as many requests.
        """
        if not ready or not sum(waiting) or ready + sum(waiting) != self.in_flight:
            return None
        worth = self.worth(waiting)
        if worth is None:
            return None
        return max(worth[segment] for segment, count in enumerate(waiting, 1) if count) - worth[0]


def measure(
    cost: CostModel,
    exit_rates: Sequence[float],
    in_flight: int,
    context: float,
    kv_fill: str,
    *,
    grain: int = TWO_EXITS_MOST_REQUESTS,
    most_owed: int = MOST_OWED_ROWS,
    last: Yardstick | None = None,
) -> Yardstick:
    """θ*, ideal and full depth.

    Args:
        cost: of each segment.
        exit_rates: at each exit point: share of the rows reaching it that exit there.
        in_flight: decoding requests, N.
        context: mean K/V entries of a request.
        kv_fill: what the layers that a token skipped cost later.
        grain: with two exit points, more requests than this are counted in units of several: θ* is then approximate.
        most_owed: fills that the engine lets be owed; what is more runs in passes of so many.
        last: what was found before, to start from where that helps.
    """
    counts = np.arange(in_flight + 1, dtype=np.float64)
    full = in_flight / float(cost.full_depth(counts[-1:], context)[0])
    times = [mean_pass_seconds(cost, s, exit_rates, counts, context, kv_fill, most_owed) for s in range(cost.segments)]
    reach, each = 1.0, 0.0
    for segment, seconds in enumerate(times):
        each += reach * float((seconds[1:] / counts[1:]).min())
        reach *= max(LEAST_EXIT_RATE, 1.0 - exit_rates[segment]) if segment < len(exit_rates) else 0.0
    optimal = full if len(times) == 1 else None
    one = two = None
    if len(times) == 2:
        one = solve_one_exit(exit_rates[0], *times)
        optimal = one.rate
    elif len(times) == 3:
        units = min(in_flight, grain)
        at = np.arange(units + 1) * (in_flight / units)
        shallow, middle, deep = (np.interp(at, counts, seconds) for seconds in times)
        start = last.two_exits if last is not None else None
        if start is not None and start.units != units:
            start = None
        two = solve_two_exits(exit_rates, shallow, middle, deep, start)
        optimal = two.rate * in_flight / units
    return Yardstick(in_flight, optimal, 1.0 / each, full, one, two)


def mean_pass_seconds(
    cost: CostModel,
    segment: int,
    exit_rates: Sequence[float],
    live: FloatArray,
    context: float,
    kv_fill: str,
    most_owed: int = MOST_OWED_ROWS,
) -> FloatArray:
    """Mean seconds of a pass over `live` rows and the fills that their requests owe there; 0 for no rows.

    A request that waits at a segment has exited before it a geometric number of times since it last ran it. Flushing
    together, n requests owe a sum of n of these: a negative binomial. Of these, all but `most_owed` have been paid by
    then, in passes of so many.
    """
    stay = float(np.prod([max(LEAST_EXIT_RATE, 1.0 - rate) for rate in exit_rates[:segment]]))
    none = np.zeros_like(live)
    if segment == 0 or kv_fill in ("alias", "mask") or stay == 1.0:
        out: FloatArray = cost.decode(segment, live, none, context, runs=True)
        return np.where(live > 0, out, 0.0)
    fills, share = _owed(live, stay)
    runs = kv_fill == "recompute"
    before = np.maximum(0.0, fills - most_owed)
    alone = float(cost.decode(segment, np.zeros(1), np.full(1, float(most_owed)), context, runs=runs)[0])
    seconds = cost.decode(segment, live[:, None], fills - before, context, runs=runs) + before / most_owed * alone
    out = (seconds * share).sum(-1)
    return np.where(live > 0, out, 0.0)


def _owed(requests: FloatArray, stay: float) -> tuple[FloatArray, FloatArray]:
    """Counts of owed fills that matter, and how likely each is, by whole numbers of requests. (n, OWED_POINTS)."""
    mean = requests * (1 - stay) / stay
    spread = (mean / stay) ** 0.5
    certain = mean > OWED_MOST_FILLS
    low = np.where(certain, mean, np.floor(np.maximum(0.0, mean - OWED_TAIL_DEVIATIONS * spread)))
    high = np.where(certain, mean, mean + (OWED_TAIL_DEVIATIONS + 3) * spread + 3)
    # Each stands for an odd number of them, of which it is the middle.
    around = np.ceil(np.maximum(0.0, (high - low) / (OWED_POINTS - 1) - 1) / 2)
    steps = np.where(certain, 0.0, 2 * around + 1)
    fills: FloatArray = (low + around)[:, None] + steps[:, None] * np.arange(OWED_POINTS)
    # A negative binomial, by logarithms of factorials; no request owes nothing.
    counted = np.where(certain[:, None], 0.0, fills)
    known = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, counted.max() + requests.max() + 1)))))
    others = np.maximum(0.0, requests[:, None] - 1)
    logs = known[(counted + others).astype(np.int64)] - known[counted.astype(np.int64)] + counted * np.log1p(-stay)
    weights = np.exp(logs - logs.max(-1, keepdims=True))
    return fills, weights / weights.sum(-1, keepdims=True)
