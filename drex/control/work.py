"""What the scheduler keeps of a pass until it is done with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from drex.control.decisions import Asked
from drex.control.memory.placement import Placed
from drex.control.plan import IntArray
from drex.control.records import Decided
from drex.control.request import Request


@dataclass(slots=True)
class Work:
    """What an outstanding pass does.

    Attributes:
        spans: seats of the pass's spans.
        live: decoding requests in it; prompts: the other ones; fills: rows of the decoding ones beside one each.
        last: segment that it runs.
        placed: its rows there.
        asked: its evaluations.
        checking: whether what it earns tells what checking exits earns.
        decided: tokens of decoding requests.
        touched: requests that got a token or ended.
        unwritten: what is not in the requests' records yet.
    """

    spans: IntArray
    live: int
    prompts: int
    fills: int
    last: int
    placed: Placed
    asked: Asked
    checking: bool
    decided: int = 0
    touched: list[Request] = field(default_factory=list)
    unwritten: Decided | None = None
