"""What the scheduler keeps of a pass until it is done with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from drex.control.decisions import Asked, Decided
from drex.control.placement import Placed
from drex.control.plan import BoolArray, IntArray
from drex.request import Request


@dataclass
class Work:
    """What an outstanding pass does.

    Attributes:
        spans, counts: seats of the pass's spans, and their rows.
        last: segment that it runs.
        placed: its rows there.
        asked: its evaluations.
        decoding: whether a request decodes, by seat.
        checking: whether what it earns tells what checking exits earns.
        decided: tokens of decoding requests.
        touched: requests that got a token or ended.
        unwritten: what is not in the requests' records yet.
    """

    spans: IntArray
    counts: IntArray
    last: int
    placed: Placed
    asked: Asked
    decoding: BoolArray
    checking: bool
    decided: int = 0
    touched: list[Request] = field(default_factory=list)
    unwritten: Decided | None = None

    @cached_property
    def live(self) -> int:
        """Decoding requests in it."""
        return int(np.count_nonzero(self.decoding[self.spans]))

    @property
    def prompts(self) -> int:
        """The other requests in it."""
        return len(self.spans) - self.live
