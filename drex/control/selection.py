"""Which rows a pass takes, given its segment: what fits beside each other, in what order, how much of a prompt."""

from __future__ import annotations

import numpy as np

from drex.config import EngineConfig
from drex.control.constants import LEAST_PROMPT_ROWS
from drex.control.cost.model import CostModel, Load
from drex.control.memory.placement import Placement
from drex.control.plan import IntArray, total
from drex.control.policy.base import Choice
from drex.control.seats import Seats
from drex.control.standing import Standing

Picked = tuple[IntArray, IntArray]
"""Seats, and how many of their pending rows. Shape (spans,) each."""


class Selection:
    """Picks rows for passes; changes nothing.

    Args:
        config: for the sizes of passes.
        placement: what slots and arena rows are left.
        seats: of the requests.
        cost: for how long a prompt's chunk keeps the others.
    """

    def __init__(self, config: EngineConfig, placement: Placement, seats: Seats, cost: CostModel) -> None:
        self.config, self.placement, self.seats, self.cost = config, placement, seats, cost

    def pick(self, choice: Choice, standing: Standing, now: float) -> Picked:
        """The rows of a pass: what the policy chose, of those who stand so, at a time."""
        return self._deep(choice, standing) if choice.segment else self._shallow(choice, standing, now)

    def ready_that_fit(self, standing: Standing) -> int:
        """Ready requests that a pass over segment 0 could take."""
        count = len(standing.ready)
        if count <= self._surely():
            return count
        return len(self._fitting(standing.ready, standing, count)[0])

    def prompt_fits(self, standing: Standing, beside: int) -> bool:
        """Whether a prompt or replay has a row that fits, with `beside` rows in the pass already."""
        urgent = standing.urgent[0]
        return len(urgent) > 0 and len(self._fitting(urgent, standing, 1, beside)[0]) > 0

    def _surely(self) -> int:
        """As many rows as fit into a pass over segment 0, whosever they are."""
        pool, slots = self.placement.pool, self.placement.slots_per_token
        return min((pool.capacity - pool.claimed) // slots, self._rows_left(), self.config.max_num_batched_tokens)

    def _rows_left(self) -> int:
        """Rows of the arena; with one segment, none is needed."""
        arena = self.placement.arena
        return arena.free if self.placement.segments > 1 else self.config.max_num_batched_tokens

    def _fitting(self, wanted: IntArray, standing: Standing, most: int, beside: int = 0) -> Picked:
        """At most so many of the wanted seats, in this order, and how many of their rows fit beside so many others."""
        per_token, reached = self.placement.slots_per_token, self.seats.reached
        budget = self.config.max_num_batched_tokens - beside
        slots = self.placement.pool.capacity - self.placement.pool.claimed - beside * per_token
        rows = self._rows_left() - beside
        taken: list[tuple[int, int]] = []
        for seat in wanted.tolist():
            if budget <= 0 or rows <= 0 or len(taken) == most:
                break
            if reached[1, seat] >= self.seats.claimed_length[seat]:
                if slots < per_token:
                    continue
                slots -= per_token
            count = min(int(standing.pending[0, seat]), budget, rows)
            taken.append((seat, count))
            budget -= count
            rows -= count
        picked = np.array(taken, dtype=np.int64).reshape(-1, 2)
        return picked[:, 0], picked[:, 1]

    def _shallow(self, choice: Choice, standing: Standing, now: float) -> Picked:
        """Decode rows, the surest and then those that are due first where not all go; then prompts in chunks."""
        ready, urgent = standing.ready, standing.urgent[0]
        if choice.ready == len(ready) <= self._surely():
            chosen = ready, standing.pending[0][ready]
        else:
            ready = self.seats.by_urgency(ready)
            order = np.lexsort((self.seats.due[ready], -self.seats.chance[ready]))
            chosen = self._fitting(ready[order], standing, choice.ready)
        if not len(urgent):
            return chosen
        seats, counts = self._fitting(self.seats.by_urgency(urgent), standing, len(urgent), beside=len(chosen[0]))
        return _join(chosen, _cut(seats, counts, self._chunk(len(chosen[0]), now)))

    def _chunk(self, decode_rows: int, now: float) -> int:
        """Prompt rows that a pass may have without making running requests late; at least a floor's worth."""
        most = self.config.max_num_batched_tokens
        slack = float(self.seats.due.min()) - now
        if slack == np.inf:
            return most
        while most > LEAST_PROMPT_ROWS:
            load = [Load(decode_rows + most, decode_rows + 1, 0, decode_rows + 1)] * self.placement.segments
            if sum(self.cost.predict(segment, each) for segment, each in enumerate(load)) <= slack:
                break
            most = max(LEAST_PROMPT_ROWS, most // 2)
        return most

    def _deep(self, choice: Choice, standing: Standing) -> Picked:
        """Buffered rows by age, then prompts, each with the fills they owe; then those that only owe fills."""
        segment, pending = choice.segment, standing.pending[choice.segment]
        waiting, most = standing.buffers[segment], self.config.max_num_batched_tokens
        if not choice.fills and not len(standing.urgent[segment]):
            counts = pending[waiting]
            if total(counts) <= most:
                return waiting, counts
        order = [waiting[np.argsort(self.seats.since[waiting], kind="stable")], standing.urgent[segment]]
        if choice.fills:
            only_owe = standing.decoding & (pending > 0)
            only_owe[waiting] = False
            others = only_owe.nonzero()[0]
            order.append(others[np.argsort(-pending[others], kind="stable")])
        seats = np.concatenate(order)
        return _cut(seats, pending[seats], most)


def _join(first: Picked, second: Picked) -> Picked:
    return np.concatenate((first[0], second[0])), np.concatenate((first[1], second[1]))


def _cut(seats: IntArray, counts: IntArray, budget: int) -> Picked:
    """The first of them, with no more rows than the budget altogether."""
    before = counts.cumsum() - counts
    some = before < budget
    return seats[some], np.minimum(counts, budget - before)[some]
