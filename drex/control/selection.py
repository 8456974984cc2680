"""Which rows a pass takes, given its segment: what fits beside each other, in what order, how much of a prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from drex.config import EngineConfig
from drex.control.cost import CostModel, Load
from drex.control.deadlines import CHUNK_FLOOR
from drex.control.placement import Placement
from drex.control.policies import Choice
from drex.control.standing import Standing
from drex.request import Request

Picked = Iterator[tuple[Request, int]]
"""Requests, and how many of their pending rows."""


class Selection:
    """Picks requests for passes; changes nothing.

    Args:
        config: for the sizes of passes.
        placement: what slots and arena rows are left.
        standing: who stands where.
        cost: for how long a prompt's chunk keeps the others.
    """

    def __init__(self, config: EngineConfig, placement: Placement, standing: Standing, cost: CostModel) -> None:
        self.config, self.placement, self.standing, self.cost = config, placement, standing, cost

    def pick(self, choice: Choice, running: Iterable[Request], now: float) -> Picked:
        """The rows of a pass.

        Args:
            choice: of the policy.
            running: all requests that are admitted, most urgent first.
            now: time.
        """
        return self._deep(choice, running) if choice.segment else self._shallow(choice, running, now)

    def ready_that_fit(self) -> int:
        """Ready requests that a pass over segment 0 could take."""
        count = len(self.standing.ready)
        slots = (self.placement.pool.capacity - self.placement.pool.claimed) // self.placement.slots_per_token
        rows = self.placement.arena.free if self.placement.segments > 1 else count
        if count <= min(slots, rows, self.config.max_num_batched_tokens):
            return count
        return sum(1 for _ in self.fitting(self.standing.ready.values(), count))

    def prompt_fits(self, beside: int) -> bool:
        """Whether a prompt or replay has a row that fits, with `beside` rows in the pass already."""
        prompts = self.standing.urgent[0]
        return bool(prompts) and any(True for _ in self.fitting(prompts.values(), 1, beside))

    def fitting(self, requests: Iterable[Request], most: int, beside: int = 0) -> Picked:
        """Requests and how many of their rows fit into a pass over segment 0, with `beside` rows in it already."""
        placement, per_token = self.placement, self.placement.slots_per_token
        budget = self.config.max_num_batched_tokens - beside
        slots = placement.pool.capacity - placement.pool.claimed - beside * per_token
        rows = placement.arena.free - beside if placement.segments > 1 else budget
        for request in requests:
            if budget <= 0 or rows <= 0 or most <= 0:
                return
            if request.frontiers[0] >= request.claimed_length:
                if slots < per_token:
                    continue
                slots -= per_token
            count = min(len(request.tokens) - request.frontiers[0], budget, rows)
            yield request, count
            budget -= count
            rows -= count
            most -= 1

    def _shallow(self, choice: Choice, running: Iterable[Request], now: float) -> Picked:
        """Decode rows, those that are due first where not all go, then prompts and replays in chunks."""
        ready: Iterable[Request] = self.standing.ready.values()
        if choice.ready < len(self.standing.ready):
            ready = sorted(ready, key=lambda request: (request.due, *urgency(request)))
        taken = 0
        for request, count in self.fitting(ready, choice.ready):
            taken += 1
            yield request, count
        prompts = self.standing.urgent[0]
        if prompts:
            chunk = self._chunk(taken, running, now)
            for request, count in self.fitting(sorted(prompts.values(), key=urgency), len(prompts), beside=taken):
                if chunk <= 0:
                    return
                yield request, min(count, chunk)
                chunk -= count

    def _chunk(self, decode_rows: int, running: Iterable[Request], now: float) -> int:
        """Prompt rows that a pass may have without making running requests late; at least a floor's worth."""
        most = self.config.max_num_batched_tokens
        slack = min([request.due for request in running], default=math.inf) - now
        if slack == math.inf:
            return most
        while most > CHUNK_FLOOR:
            load = [Load(decode_rows + most, decode_rows + 1, 0, decode_rows + 1)] * self.placement.segments
            if sum(self.cost.predict(segment, each) for segment, each in enumerate(load)) <= slack:
                break
            most = max(CHUNK_FLOOR, most // 2)
        return most

    def _deep(self, choice: Choice, running: Iterable[Request]) -> Picked:
        """Buffered rows by age, then prompts, each with the fills they owe; then those that only owe fills."""
        segment = choice.segment
        order = [*self.standing.buffers[segment].oldest_first(), *self.standing.urgent[segment].values()]
        if choice.fills:
            known = {request.request_id for request in order}
            idle = [r for r in running if not r.in_pass and r.request_id not in known and r.pending(segment)]
            order.extend(sorted(idle, key=lambda request: -request.pending(segment)))
        budget = self.config.max_num_batched_tokens
        for request in order:
            if budget == 0:
                return
            count = min(request.pending(segment), budget)
            yield request, count
            budget -= count


def urgency(request: Request) -> tuple[int, int]:
    """What requests are sorted by: priority, then arrival."""
    return request.priority, request.arrival
