"""When each request's next token is due, by its own targets and the engine's bound on slowdown.

Token k of a request (from 0) is due at first token + k · tpot, and at the token before + itl. `max_slowdown` times what
full depth would take for each token, at as many in flight, adds up to a due time of its own. Times are in seconds.
"""

from __future__ import annotations

import math

import numpy as np

from drex.control.plan import BoolArray, FloatArray
from drex.control.request import Request
from drex.sampling_params import SamplingParams

CHUNK_FLOOR = 16
"""Prompt rows a pass may have whatever is due: prompts are never starved by deadlines."""


class Deadlines:
    """Sets due times and counts what could not be kept.

    Args:
        max_slowdown: bound on how much longer than at full depth any request may take; None: no bound.

    Attributes:
        infeasible: tokens that were due before the passes still ahead of them could have run, when they were buffered.
        late: tokens that came after they were due.
    """

    def __init__(self, max_slowdown: float | None) -> None:
        self.max_slowdown = max_slowdown
        self.infeasible = 0
        self.late = 0

    def emitted(self, request: Request, number: int, now: float, full_step: float) -> None:
        """A token came; set when the next is due.

        Args:
            request: that it is of.
            number: of its output tokens, this one included.
            now: time.
            full_step: seconds a token takes at full depth, with as many in flight.
        """
        if now > request.due + 1e-9:
            self.late += 1
        params = request.params
        if request.first_token_at is None:
            request.first_token_came(now)
        if self.max_slowdown is None and params.tpot_ms is None and params.itl_ms is None:
            return
        due = math.inf
        if params.tpot_ms is not None:
            assert request.first_token_at is not None
            due = request.first_token_at + number * params.tpot_ms / 1e3
        if params.itl_ms is not None:
            due = min(due, now + params.itl_ms / 1e3)
        paced_due = request.paced_due
        if self.max_slowdown is not None:
            paced_due += self.max_slowdown * full_step
            due = min(due, paced_due)
        request.next_is_due(due, paced_due)

    def bounds(self, paced: BoolArray) -> BoolArray:
        """Whether requests have due times, by whether they have targets of their own."""
        return paced if self.max_slowdown is None else np.ones_like(paced)

    def buffered(self, due: FloatArray, now: float, ahead: float) -> None:
        """Rows whose tokens are due then enter a buffer, with `ahead` seconds of passes before them."""
        self.infeasible += int((now + ahead > due).sum())


def pace(params: SamplingParams) -> float:
    """The target for a token, in seconds; infinite where there is none."""
    return min(params.tpot_ms or math.inf, params.itl_ms or math.inf) / 1e3
