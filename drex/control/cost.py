"""The cost model: what a pass takes, by segment and load, fitted to measured passes and kept true while serving.

Seconds are whole steps of the engine, scheduling included. The model is

    T_s = rows_s(full rows) + span_s · spans + context_s · entries + head_s(evaluations) + kv_s · K/V-only rows

with piecewise-linear curves for rows and head: a machine's steps (tiles, narrow products, graph buckets) don't follow
one line. Online, each segment keeps a correction by size of the pass, a moving geometric mean of measured / predicted.

Invariants: predictions are positive; a correction only moves by what was observed.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from drex.control.plan import Pass

FloatArray = npt.NDArray[np.float64]

ADAPTATION = 0.05
"""Weight of a new observation in a correction's moving mean."""
CLIP = math.log(4.0)
"""One observation counts as at most this far off (in logarithms): a pause of the machine is no new machine."""
WINDOW = 4096
"""Passes over which errors are reported."""


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
        spans = batch.spans
        return cls(
            rows=sum([span.full.size for span in spans]),
            spans=len(spans),
            entries=sum([span.context[0].length for span in spans]),
            evaluations=sum([len(span.evaluations) for span in spans]),
            kv_rows=sum([span.fill.size for span in spans]),
        )


@dataclass(frozen=True)
class Curve:
    """Seconds by count, linear between the points, from the origin's value on, and with the last slope beyond.

    Attributes:
        counts: ascending, at least one, from 1 on.
        seconds: at these counts; what they imply below the first count is the first value.
    """

    counts: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.counts or len(self.counts) != len(self.seconds):
            raise ValueError("a cost curve needs as many seconds as counts, and at least one")
        if list(self.counts) != sorted(set(self.counts)) or self.counts[0] <= 0:
            raise ValueError(f"counts {list(self.counts)} of a cost curve: ascending, above 0")

    def at(self, count: FloatArray | np.float64) -> FloatArray:
        """Seconds at any counts; 0 at 0."""
        xs, ys = np.array(self.counts), np.array(self.seconds)
        out: FloatArray = np.interp(count, xs, ys)
        if len(xs) > 1:
            slope = max(0.0, float((ys[-1] - ys[-2]) / (xs[-1] - xs[-2])))
            out = out + slope * np.maximum(0.0, count - xs[-1])
        else:
            out = out * np.maximum(1.0, count / xs[-1])
        return np.where(count > 0, out, 0.0)


@dataclass(frozen=True)
class SegmentCost:
    """Costs of one segment in seconds.

    Attributes:
        rows: of its layers, by rows that run in full, all of one request.
        head: of the head at its end, by evaluations.
        span: of each further request among the rows.
        entry: of each K/V entry that attention reads.
        kv_row: of each row that only writes K/V (`project`).
    """

    rows: Curve
    head: Curve
    span: float
    entry: float
    kv_row: float

    def seconds(
        self, rows: np.float64, spans: np.float64, entries: np.float64, evaluations: np.float64, kv_rows: np.float64
    ) -> float:
        """Seconds of a pass."""
        further = max(0.0, spans - 1)
        out = float(self.rows.at(rows)) + float(self.head.at(evaluations))
        return out + self.span * further + self.entry * entries + self.kv_row * kv_rows

    def live_seconds(self, live: FloatArray, context: float) -> FloatArray:
        """What live rows add to a pass, one a request: K/V that is read, and the head."""
        out: FloatArray = self.span * np.maximum(0.0, live - 1) + self.entry * live * context + self.head.at(live)
        return out


@dataclass(frozen=True)
class Profile:
    """Fitted costs of a model on a machine.

    Attributes:
        segments: in order; the last one's head is the final head.
        threads: of the CPU that it was measured with; None on a device of its own.
        source: where it comes from, for people: machine and date, or the preset's name.
    """

    segments: tuple[SegmentCost, ...]
    threads: int | None = None
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Profile:
        """Read what `to_dict` gave.

        Raises:
            ValueError: not a profile.
        """
        try:
            segments = tuple(
                SegmentCost(
                    rows=_curve(part["rows"]),
                    head=_curve(part["head"]),
                    span=float(part["span"]),
                    entry=float(part["entry"]),
                    kv_row=float(part["kv_row"]),
                )
                for part in data["segments"]
            )
            return cls(segments, data.get("threads"), str(data.get("source", "")))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a cost profile ({error!r}): make one with `drex profile`") from error

    def scaled(self, factor: float) -> Profile:
        """All costs times a factor: a profile of another machine, or one that is wrong on purpose."""

        def curve(old: Curve) -> Curve:
            return Curve(old.counts, tuple(factor * value for value in old.seconds))

        segments = tuple(
            SegmentCost(curve(c.rows), curve(c.head), factor * c.span, factor * c.entry, factor * c.kv_row)
            for c in self.segments
        )
        return Profile(segments, self.threads, self.source)


def load_profile(path: str | Path) -> Profile:
    """Read a profile's file. Raises ValueError if it is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a profile ({error}): make one with `drex profile`") from error
    return Profile.from_dict(data)


def nominal(lengths: Sequence[int]) -> Profile:
    """Costs of a made-up machine that is bound by reading weights: to start from where nothing was measured.

    Args:
        lengths: layers of each segment.
    """
    layer, row = 1e-3, 2e-5
    counts = (1.0, 64.0)
    head = Curve(counts, tuple(layer + row * count for count in counts))
    segments = tuple(
        SegmentCost(Curve(counts, tuple(n * (layer + row * count) for count in counts)), head, 0.0, 1e-8 * n, row * n)
        for n in lengths
    )
    return Profile(segments, source="nominal")


def _curve(data: dict[str, Sequence[float]]) -> Curve:
    return Curve(tuple(map(float, data["counts"])), tuple(map(float, data["seconds"])))


class CostModel:
    """A profile, corrected by what passes really took, and a record of how far off it was.

    Args:
        profile: to start from.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._corrections: list[dict[int, float]] = [{} for _ in profile.segments]
        self._errors: deque[float] = deque(maxlen=WINDOW)

    @property
    def segments(self) -> int:
        return len(self.profile.segments)

    def copy(self) -> CostModel:
        """One that predicts the same and learns for itself."""
        other = CostModel(self.profile)
        other._corrections = [dict(known) for known in self._corrections]
        return other

    def predict(self, segment: int, load: Load) -> float:
        """Seconds that a pass will take."""
        rows, spans, entries, evaluations, kv_rows = (np.float64(value) for value in load)
        cost = self.profile.segments[segment]
        base = cost.seconds(rows, spans, entries, evaluations, kv_rows)
        return max(float(base), 1e-9) * math.exp(self._correction(segment, load.rows + load.kv_rows))

    def decode(self, segment: int, live: FloatArray, fills: FloatArray, context: float, *, runs: bool) -> FloatArray:
        """Seconds of passes over live rows and the fills that they owe, with the head at the end on each live row.

        Args:
            segment: to run.
            live: rows, one a request.
            fills: rows, of the same shape.
            context: K/V entries of a request.
            runs: fill rows run in full (`recompute`); otherwise they only write K/V.
        """
        cost = self.profile.segments[segment]
        total = live + fills
        seconds = cost.rows.at(total if runs else live) + cost.live_seconds(live, context)
        if not runs:
            seconds = seconds + cost.kv_row * fills
        return seconds * self.factors(segment, total)

    def factors(self, segment: int, rows: FloatArray) -> FloatArray:
        """Corrections of passes by all their rows, those that only write K/V included."""
        known = self._corrections[segment]
        if not known:
            return np.ones_like(rows)
        sizes = np.array(sorted(known))
        wanted = np.round(np.log2(np.maximum(1.0, rows)))
        # Nearest, the smaller of two as near.
        nearest = sizes[np.abs(wanted[..., None] - sizes).argmin(-1)]
        out: FloatArray = np.exp(np.vectorize(known.__getitem__, otypes=[np.float64])(nearest))
        return out

    def head_seconds(self, segment: int, rows: float) -> float:
        """Evaluations of the head at a segment's end."""
        counts = np.array([rows])
        return float((self.profile.segments[segment].head.at(counts) * self.factors(segment, counts))[0])

    def full_depth(self, rows: FloatArray, context: float) -> FloatArray:
        """Seconds in which all layers and the final head, no exit head, take `rows` requests one token further."""
        total = np.zeros_like(rows)
        for segment, cost in enumerate(self.profile.segments):
            total = total + self.decode(segment, rows, np.zeros_like(rows), context, runs=True)
            if segment < self.segments - 1:
                total = total - cost.head.at(rows) * self.factors(segment, rows)
        return total

    def observe(self, segment: int, load: Load, seconds: float) -> None:
        """Learn from a pass that was run."""
        predicted = self.predict(segment, load)
        self._errors.append(abs(predicted - seconds) / seconds if seconds > 0 else 0.0)
        off = min(CLIP, max(-CLIP, math.log(max(seconds, 1e-9) / predicted)))
        size, known = _size(load.rows + load.kv_rows), self._corrections[segment]
        known[size] = self._correction(segment, load.rows + load.kv_rows) + ADAPTATION * off

    def fit(self, passes: Iterable[tuple[int, Load, float]]) -> None:
        """Correct to the medians of passes that were run: (segment, load, seconds)."""
        bare = CostModel(self.profile)
        logs: list[dict[int, list[float]]] = [{} for _ in self._corrections]
        for segment, load, seconds in passes:
            size = _size(load.rows + load.kv_rows)
            logs[segment].setdefault(size, []).append(math.log(max(seconds, 1e-9) / bare.predict(segment, load)))
        self._corrections = [{size: float(np.median(values)) for size, values in each.items()} for each in logs]

    def error_quantiles(self) -> dict[str, float]:
        """Median and 90th percentile of |predicted - measured| / measured over the last passes; empty before any."""
        if not self._errors:
            return {}
        p50, p90 = np.quantile(np.array(self._errors), (0.5, 0.9))
        return {"p50": float(p50), "p90": float(p90)}

    def _correction(self, segment: int, rows: int) -> float:
        """Logarithm of the factor on a prediction: of this size of pass, or of the nearest one known."""
        known, size = self._corrections[segment], _size(rows)
        if size in known or not known:
            return known.get(size, 0.0)
        return known[min(sorted(known), key=lambda other: abs(other - size))]


def _size(rows: int) -> int:
    return round(math.log2(max(1, rows)))
