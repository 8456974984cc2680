"""The cost model: what a pass takes, by segment and load, fitted to measured passes and kept true while serving.

Seconds are whole steps of the engine, scheduling included. The model is

    T_s = rows_s(full rows) + span_s · spans + context_s · entries + head_s(evaluations) + kv_s · K/V-only rows
          + engine + request · spans

with piecewise-linear curves for rows and head: a machine's steps (tiles, narrow products, graph buckets) don't follow
one line. The last two are the engine's own time. Online, there is a correction for the whole machine, and each segment
keeps some by size of the pass: moving geometric means of measured / predicted. A machine that slows down does so for
all passes, also for those that are rare. Passes over all segments at once have corrections of their own.

Invariants: predictions are positive; a correction only moves by what was observed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from drex.control.constants import (
    AT_ONCE_KNOWN_PASSES,
    CLIP_LOG,
    CLIP_OF_SIZE_LOG,
    ERROR_WINDOW_PASSES,
    MACHINE_WEIGHT,
    PROFILE_WEIGHT_PASSES,
)
from drex.control.cost.corrections import Corrections
from drex.control.cost.profile import Profile
from drex.control.plan import FloatArray, Pass, total


class Load(NamedTuple):
    """What a pass has to do; `entries` is K/V read, counted once a span."""

    rows: int
    spans: int
    entries: int
    evaluations: int
    kv_rows: int = 0

    @classmethod
    def of(cls, batch: Pass) -> Load:
        """The load of a pass."""
        return cls(
            rows=batch.full.size,
            spans=batch.spans,
            entries=total(batch.context.lengths),
            evaluations=len(batch.evaluations),
            kv_rows=batch.fill.size,
        )


class CostModel:
    """A profile, corrected by what passes really took, and a record of how far off it was.

    Args:
        profile: to start from.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        # Logarithms: of all passes, and beside that by segment and size.
        self._machine = 0.0
        self._corrections = [Corrections(PROFILE_WEIGHT_PASSES) for _ in profile.segments]
        # Of all segments at once beside one by one, which no profile tells.
        self._through = Corrections(0.0)
        # Whether the last pass was one over all segments.
        self._went_through = False
        self._errors: deque[float] = deque(maxlen=ERROR_WINDOW_PASSES)

    @property
    def segments(self) -> int:
        return len(self.profile.segments)

    def copy(self) -> CostModel:
        """One that predicts the same and learns for itself."""
        other = CostModel(self.profile)
        other._machine, other._corrections = self._machine, [known.copy() for known in self._corrections]
        other._through = self._through.copy()
        return other

    def predict(self, segment: int, load: Load) -> float:
        """Seconds that a pass will take."""
        base = self.profile.segments[segment].seconds(*load) + self.profile.own.seconds(load.spans)
        return max(base, 1e-9) * math.exp(self._correction(segment, load.rows + load.kv_rows))

    def decode(self, segment: int, live: FloatArray, fills: FloatArray, context: float, *, runs: bool) -> FloatArray:
        """Seconds of passes over live rows and the fills that they owe, with the head at the end on each live row.

        Args:
            segment: to run.
            live: rows, one a request.
            fills: rows, of the same shape.
            context: K/V entries of a request.
            runs: fill rows run in full (`recompute`); otherwise they only write K/V.
        """
        total = live + fills
        seconds = self.row_seconds(segment, total if runs else live) + self.live_seconds(segment, live, context)
        if not runs:
            seconds = seconds + self.profile.segments[segment].kv_row * fills
        return seconds * self.factors(segment, total)

    def row_seconds(self, segment: int, rows: FloatArray) -> FloatArray:
        """What a pass takes for rows, before corrections: the layers', and what a pass costs the engine."""
        return np.asarray(self.profile.segments[segment].rows.at(rows) + self.profile.own.per_pass * (rows > 0))

    def live_seconds(self, segment: int, live: FloatArray, context: float) -> FloatArray:
        """What live rows add to a pass, before corrections, one a request: K/V that is read, the head, the engine."""
        return self.profile.segments[segment].live_seconds(live, context) + self.profile.own.per_request * live

    def factors(self, segment: int, rows: FloatArray) -> FloatArray:
        """Corrections of passes by all their rows, those that only write K/V included."""
        return np.exp(self._machine + self._corrections[segment].at(rows))

    def head_seconds(self, segment: int, rows: float) -> float:
        """Evaluations of the head at a segment's end."""
        counts = np.array([rows])
        return float((self.profile.segments[segment].head.at(counts) * self.factors(segment, counts))[0])

    def full_depth(self, rows: FloatArray, context: float) -> FloatArray:
        """Seconds in which all layers and the final head, no exit head, take `rows` requests one token further.

        Segment by segment; `at_once` says what it takes less in one pass.
        """
        total = np.zeros_like(rows)
        for segment, cost in enumerate(self.profile.segments):
            total = total + self.decode(segment, rows, np.zeros_like(rows), context, runs=True)
            if segment < self.segments - 1:
                total = total - cost.head.at(rows) * self.factors(segment, rows)
        return total

    def at_once(self, rows: FloatArray) -> FloatArray:
        """What a pass over all segments takes, of what these take one by one; 1 until such passes were seen."""
        return np.exp(self._through.at(rows))

    def predict_through(self, load: Load) -> float:
        """Seconds that a pass over all segments will take; the head at its end is evaluated."""
        return self._one_by_one(load) * math.exp(self._through.at_one(load.rows))

    def predict_parts(self, parts: Sequence[tuple[int, Load]]) -> float:
        """Seconds of a pass over these segments, with their loads: the engine's own time comes once."""
        again = 0.0
        for segment, load in parts[1:]:
            correction = self._correction(segment, load.rows + load.kv_rows)
            again += math.exp(correction) * self.profile.own.seconds(load.spans)
        return sum(self.predict(segment, load) for segment, load in parts) - again

    def _one_by_one(self, load: Load) -> float:
        last = self.segments - 1
        before = sum(self.predict(segment, load._replace(evaluations=0)) for segment in range(last))
        return before + self.predict(last, load)

    def observe(self, segment: int, load: Load, seconds: float) -> None:
        """Learn from a pass that was run."""
        self._went_through = False
        predicted = self.predict(segment, load)
        self._errors.append(abs(predicted - seconds) / seconds if seconds > 0 else 0.0)
        off = min(CLIP_LOG, max(-CLIP_LOG, math.log(max(seconds, 1e-9) / predicted)))
        self._machine += MACHINE_WEIGHT * off
        self._corrections[segment].learn(load.rows + load.kv_rows, min(CLIP_OF_SIZE_LOG, max(-CLIP_OF_SIZE_LOG, off)))

    def observe_through(self, load: Load, seconds: float) -> None:
        """Learn from a pass over all segments, if it is not the first after others, when caches may be cold."""
        in_a_row, self._went_through = self._went_through, True
        if not in_a_row:
            return
        off = min(CLIP_LOG, max(-CLIP_LOG, math.log(max(seconds, 1e-9) / self.predict_through(load))))
        # Nothing was known of it before; once it is, it's the machine that changes.
        if self._through.seen(load.rows) >= AT_ONCE_KNOWN_PASSES:
            self._machine += MACHINE_WEIGHT * off
        self._through.learn(load.rows, off)

    def fit(self, passes: Iterable[tuple[int, Load, float]]) -> None:
        """Correct to the medians of passes that were run: (segment, load, seconds)."""
        bare = CostModel(self.profile)
        logs: list[dict[int, list[float]]] = [{} for _ in self._corrections]
        for segment, load, seconds in passes:
            size = round(math.log2(max(1, load.rows + load.kv_rows)))
            logs[segment].setdefault(size, []).append(math.log(max(seconds, 1e-9) / bare.predict(segment, load)))
        self._machine = 0.0
        medians = [{size: float(np.median(values)) for size, values in each.items()} for each in logs]
        self._corrections = [Corrections(PROFILE_WEIGHT_PASSES, each) for each in medians]

    def error_quantiles(self) -> dict[str, float]:
        """Median and 90th percentile of |predicted - measured| / measured over the last passes; empty before any."""
        if not self._errors:
            return {}
        p50, p90 = np.quantile(np.array(self._errors), (0.5, 0.9))
        return {"p50": float(p50), "p90": float(p90)}

    def _correction(self, segment: int, rows: int) -> float:
        """Logarithm of the factor on a prediction for passes of that size."""
        return self._machine + self._corrections[segment].at_one(rows)
