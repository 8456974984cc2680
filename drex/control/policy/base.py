"""What a policy is asked, what it answers, and the simplest one: which segment runs next, and which rows exit.

A policy sees counts and verdicts, never requests. docs/extending.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from drex.config import EngineConfig
from drex.control.constants import PROBE_WEIGHT
from drex.control.cost.model import CostModel
from drex.control.plan import BoolArray, FloatArray
from drex.control.policy.flush import FlushRule
from drex.control.policy.outlook import Solving
from drex.control.policy.rates import ExitRates


class Setting(NamedTuple):
    """What a policy decides for.

    Attributes:
        config: of the engine.
        cost: of passes; it learns from those that are run.
        kv_fill: what fills the layers that a token skipped.
        solving: where the optimum is computed; None: in place.
    """

    config: EngineConfig
    cost: CostModel
    kv_fill: str
    solving: Solving | None = None


class View(NamedTuple):
    """What could run now. Sequences have an entry a segment.

    Attributes:
        pass_number: of the pass to choose.
        now: time in seconds.
        ready: decoding requests that fit into a pass over segment 0.
        prompts: whether a prompt or replay has rows that fit into it.
        live: rows that wait in the buffers (0 at segment 0).
        fills: rows that their requests owe there.
        urgent: requests whose prompt, replay or first token stands there.
        oldest_age: passes that the oldest buffered row has waited.
        due: when the first buffered token is due.
        owed: decided rows that owe K/V there, of all requests.
        decoding: requests that have their first token.
        context: mean K/V entries of a request.
        ahead, lossless: whether any of the decoding requests runs ahead, and whether any does so losslessly.
        chances: how likely the next row of each of the `ready` is to be of use, descending; None: all surely are.
    """

    pass_number: int
    now: float
    ready: int
    prompts: bool
    live: Sequence[int]
    fills: Sequence[int]
    urgent: Sequence[int]
    oldest_age: Sequence[int]
    due: Sequence[float]
    owed: Sequence[int]
    decoding: int
    context: float
    ahead: bool = False
    lossless: bool = False
    chances: FloatArray | None = None


class Choice(NamedTuple):
    """The segment to run; at segment 0 how many ready rows, deeper whether rows that only owe fills come along.

    `through`: all segments at once, if nothing has to come before, with no exit checked.
    """

    segment: int
    ready: int = 0
    fills: bool = False
    through: bool = False


class Checks(NamedTuple):
    """What exit heads said of the decode rows of a pass: confidence and threshold, and whether the two mean an exit."""

    confidences: FloatArray
    thresholds: FloatArray
    exited: BoolArray


class Split:
    """Flush at once: what stands deepest goes first. With no exit points (`full`) there is nothing to choose.

    Args:
        setting: what it decides for.

    Attributes:
        config: of the engine.
        rates: of exits, as observed.
        rule: what passes cost, and what they earn.
        checking: whether the rows of the last pass over segment 0, which may wait deeper now, were checked as a rule.
    """

    def __init__(self, setting: Setting) -> None:
        config, cost = setting.config, setting.cost
        self.config, self.checking = config, True
        self.rates = ExitRates(cost.segments - 1)
        most = 2 * config.max_num_seqs + config.fill_rows
        self.rule = FlushRule(cost, self.rates, setting.kv_fill, most, config.fill_rows, setting.solving)

    def checks_exits(self, segment: int) -> bool:
        """Whether a pass over a segment evaluates exit heads at all; asked once for each."""
        return True

    @property
    def resting(self) -> bool:
        """Whether exits are not checked for now, because that does not pay and `adaptive` lets it matter."""
        return False

    def observe(self, segment: int, rows: int, exited: int) -> None:
        """So many decode rows were checked after a segment, and exited."""
        weight = PROBE_WEIGHT if self.resting else 1
        self.rates.observe(segment, weight * rows, weight * exited)

    def choose(self, view: View) -> Choice | None:
        """The next segment, or None if nothing is ready."""
        for segment in range(len(view.live) - 1, 0, -1):
            if view.live[segment] or view.urgent[segment]:
                return Choice(segment)
        return Choice(0, view.ready) if view.ready or view.prompts else None

    def exits(self, segment: int, checks: Checks) -> BoolArray:
        """Which decode rows of a pass exit, given what the exit head said of each, at least one."""
        return checks.exited
