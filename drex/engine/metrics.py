"""Events in, percentiles out: what each request waited for, and whether it got what it was promised.

Times are in seconds inside and milliseconds in summaries.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from drex.control.cost.model import Load
from drex.control.request import Request
from drex.outputs import FinishReason

PERCENTILES = (50, 95, 99)


class PassRecord(NamedTuple):
    """One pass, as the engine saw it.

    Attributes:
        number, segment: of the pass, the first if it ran several; through: whether it did.
        ready: decoding requests before segment 0 when it was chosen.
        live: rows that waited at each segment (0 at segment 0).
        prompts: whether requests other than decoding ones took part.
        load: what it had to do; of several segments at the last of them.
        gain: what flushing was predicted to be worth more than going on, in tokens, when both were possible and the
            yardstick for as many requests was at hand; else None.
        tokens: decided by it.
        started, seconds: of the whole step.
    """

    number: int
    segment: int
    through: bool
    ready: int
    live: tuple[int, ...]
    prompts: bool
    load: Load
    gain: float | None
    tokens: int
    started: float
    seconds: float


@dataclass
class Metrics:
    """What happened to requests that ended.

    Attributes:
        finished: by reason.
        exits: tokens by segments executed.
        involuntary_exits: tokens emitted at an exit point that their request's rule did not allow, or whose recorded
            confidence is below the rule's threshold.
        involuntary_stays: tokens emitted deeper than an exit point at which their confidence reached the threshold.
        checks, reached: by exit point: rows asked, and those whose confidence reached the threshold.
        exited_confidences: of tokens that left early.
        good: requests that met all their targets; `promised` had any.
    """

    finished: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    checks: Counter[int] = field(default_factory=Counter)
    reached: Counter[int] = field(default_factory=Counter)
    involuntary_exits: int = 0
    involuntary_stays: int = 0
    promised: int = 0
    good: int = 0
    tokens: int = 0
    exited_confidences: array[float] = field(default_factory=lambda: array("d"))
    _ttft: array[float] = field(default_factory=lambda: array("d"))
    _tpot: array[float] = field(default_factory=lambda: array("d"))
    _itl: array[float] = field(default_factory=lambda: array("d"))
    _rct: array[float] = field(default_factory=lambda: array("d"))
    _longest_gap: dict[str, float] = field(default_factory=dict)

    def gap(self, request: Request, seconds: float) -> None:
        """A token came so long after the one before."""
        self._itl.append(seconds)
        if request.params.itl_ms is not None:
            name = request.request_id
            self._longest_gap[name] = max(seconds, self._longest_gap.get(name, 0.0))

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """A request ended."""
        self.finished[reason.value] += 1
        longest = self._longest_gap.pop(request.request_id, 0.0)
        self._count_exits(request)
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        assert request.first_token_at is not None
        ttft, rct = request.first_token_at - request.arrived_at, now - request.arrived_at
        self._ttft.append(ttft)
        self._rct.append(rct)
        tpot = (now - request.first_token_at) / (request.num_output - 1) if request.num_output > 1 else 0.0
        if request.num_output > 1:
            self._tpot.append(tpot)
        params = request.params
        kept = [
            seconds <= target / 1e3
            for seconds, target in ((ttft, params.ttft_ms), (tpot, params.tpot_ms), (longest, params.itl_ms))
            if target is not None
        ]
        self.promised += bool(kept)
        self.good += bool(kept) and all(kept)

    def _count_exits(self, request: Request) -> None:
        self.tokens += len(request.records)
        for number, record in enumerate(request.records):
            self.exits[record.depth] += 1
            for check in record.checks:
                self.checks[check.exit_index] += 1
                self.reached[check.exit_index] += check.confidence >= check.threshold
            passed = record.checks
            if record.depth < request.num_segments:
                at_exit = [check for check in passed if check.exit_index == record.depth - 1]
                passed = tuple(check for check in passed if check.exit_index < record.depth - 1)
                self.exited_confidences.extend(check.confidence for check in at_exit)
                confidence = at_exit[0].confidence if at_exit else -math.inf
                self.involuntary_exits += not request.may_exit(record.depth - 1, number, confidence)
            self.involuntary_stays += any(check.confidence >= check.threshold for check in passed)

    def times(self, kind: str) -> Sequence[float]:
        """All of `ttft`, `tpot`, `itl` or `rct`, in seconds."""
        return {"ttft": self._ttft, "tpot": self._tpot, "itl": self._itl, "rct": self._rct}[kind]

    def trim(self, most: int) -> None:
        """Forget the oldest times and confidences, so that about `most` of each kind stay: for engines that run on.

        Percentiles are then over the recent past; counts go on.
        """
        for values in (self._ttft, self._tpot, self._itl, self._rct, self.exited_confidences):
            if len(values) > 2 * most:
                del values[:-most]

    def summary(self) -> dict[str, Any]:
        """Times in milliseconds: mean and percentiles of each kind; and `goodput`, the share that met its targets."""
        return {
            "requests": sum(self.finished.values()),
            "finished": dict(self.finished),
            **{f"{kind}_ms": quantiles(self.times(kind)) for kind in ("ttft", "tpot", "itl", "rct")},
            "goodput": self.good / self.promised if self.promised else None,
        }


def quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds; None for each where there is nothing."""
    names = ["mean", *(f"p{p}" for p in PERCENTILES)]
    if not len(seconds):
        return dict.fromkeys(names)
    values = np.asarray(seconds) * 1e3
    found = [float(values.mean()), *(float(v) for v in np.percentile(values, PERCENTILES))]
    assert all(math.isfinite(value) for value in found)
    return dict(zip(names, found, strict=True))
