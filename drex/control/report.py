"""What a scheduler has counted and learnt, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SchedulerReport:
    """A scheduler at one moment. Rates are tokens a second while decoding; None while they aren't known.

    Attributes:
        running, waiting: requests that have a seat, and that wait for one.
        buffered: rows that wait, by exit point.
        achieved: a moving average.
        theta_star, ideal: solved for the present load or the nearest one that was solved.
        full: at full depth.
        exit_rates: share of the rows reaching each exit point that exit there.
        unchecked: tokens that could have exited somewhere and were not asked (`adaptive`).
        run_ahead: drafted tokens, and what became of them.
        late: tokens that came after they were due.
        infeasible: tokens that were due before the passes still ahead of them could have run, when they were buffered.
        preemptions: how often a request has lost its K/V.
        cost_error: quantiles of how far off predicted pass times were.
        slots_in_use, slots: K/V slots.
    """

    running: int
    waiting: int
    buffered: list[int]
    achieved: float | None
    theta_star: float | None
    ideal: float | None
    full: float | None
    exit_rates: tuple[float, ...]
    unchecked: int
    run_ahead: dict[str, Any]
    late: int
    infeasible: int
    preemptions: int
    cost_error: dict[str, float]
    slots_in_use: int
    slots: int
