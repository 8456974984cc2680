"""θ*, ideal and full depth from what one run measured, and how often the policy decided as the optimum would have.

Costs are refitted to whole-step wall times of all policies that took turns at one count in flight, exit rates are those
of the tokens that were checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from drex.comparison.cell import Cell
from drex.control.cost.model import CostModel
from drex.control.policy.yardstick import Yardstick, measure

EACH_ROW = ("drex", "split")
"""Policies under which a row exits where its own confidence says so, and its token is out with that."""
TIE = 0.005
"""Decisions whose worths are closer than this share of a token a request are ties, and counted apart."""


@dataclass(frozen=True)
class Found:
    """A yardstick as measured.

    Attributes:
        full: measured at full depth where that policy ran, else from the costs of the segments. Tokens a second.
        optimal, ideal: tokens a second.
        cost, exit_rates, context, kv_fill, most_owed: what they were solved from.
    """

    full: float
    optimal: float | None
    ideal: float
    cost: CostModel
    exit_rates: tuple[float, ...]
    context: float
    kv_fill: str
    most_owed: int

    def at(self, in_flight: int) -> Yardstick:
        """Solved for another count."""
        return measure(self.cost, self.exit_rates, in_flight, self.context, self.kv_fill, most_owed=self.most_owed)


def yardstick(cells: Sequence[Cell]) -> Found | None:
    """From cells of one count in flight; None where no policy with exits decoded anything."""
    with_exits = [cell for cell in cells if cell.policy != "full"]
    seen = [record for cell in with_exits for record in cell.history if not record.prompts and not record.through]
    if not seen:
        return None
    first = with_exits[0]
    scheduler = first.engine.scheduler
    cost = CostModel(scheduler.cost.profile)
    cost.fit([(record.segment, record.load, record.seconds) for record in seen])
    for record in (record for cell in with_exits for record in cell.history if record.through and not record.prompts):
        cost.observe_through(record.load, record.seconds)
    rates = _exit_rates(with_exits, scheduler.segments - 1)
    shallow = [record.load for record in seen if record.segment == 0]
    context = sum(load.entries for load in shallow) / max(1, sum(load.spans for load in shallow))
    kv_fill, most_owed = scheduler.kv_fill, scheduler.config.fill_rows
    solved = measure(cost, rates, first.in_flight, context, kv_fill, most_owed=most_owed)
    full = next((_full_rate(cell) for cell in cells if cell.policy == "full"), None)
    return Found(full or solved.full, solved.optimal, solved.ideal, cost, rates, context, kv_fill, most_owed)


def _full_rate(cell: Cell) -> float | None:
    """Decode rate of passes with every seat taken."""
    whole = [r for r in cell.history if not r.prompts and r.load.spans == cell.in_flight]
    seconds = sum(record.seconds for record in whole)
    return sum(record.tokens for record in whole) / seconds if seconds else None


def _exit_rates(cells: Sequence[Cell], exits: int) -> tuple[float, ...]:
    """Share of the checks at each exit point that reached the threshold.

    Of the passes that are looked at, where a policy let each row decide for itself; else of all.
    """
    checks, reached = [0] * exits, [0] * exits
    for cell in cells:
        for record in cell.history if cell.policy in EACH_ROW else ():
            if record.segment < exits and not record.prompts and not record.through:
                checks[record.segment] += record.load.evaluations
                reached[record.segment] += record.tokens
    if all(checks):
        return tuple(hit / count for hit, count in zip(reached, checks, strict=True))
    checks, reached = [0] * exits, [0] * exits
    for cell in cells:
        for exit_index in range(exits):
            checks[exit_index] += cell.metrics.checks[exit_index]
            reached[exit_index] += cell.metrics.reached[exit_index]
    return tuple(hit / count if count else 0.0 for hit, count in zip(reached, checks, strict=True))


class Accuracy(NamedTuple):
    """Decisions to flush or to go on: those predicted rightly, all that count, and those that were too close to."""

    right: int
    decisions: int
    ties: int


def accuracy(cell: Cell, found: Found) -> Accuracy:
    """How often flushing was predicted to be worth more, or less, than going on, and was.

    Predicted with the costs and exit rates held at the time, against those of the whole run. States where both were
    possible count: some requests ready, some waiting, no prompts.
    """
    solved: dict[int, Yardstick] = {}
    right = decisions = ties = 0
    for record in cell.history:
        total = record.ready + sum(record.live)
        if record.gain is None or record.prompts:
            continue
        if total not in solved:
            solved[total] = found.at(total)
        true = solved[total].gain(record.ready, record.live[1:])
        if true is None:
            continue
        if min(abs(true), abs(record.gain)) < TIE * total:
            ties += 1
            continue
        decisions += 1
        right += (true > 0) == (record.gain > 0)
    return Accuracy(right, decisions, ties)
