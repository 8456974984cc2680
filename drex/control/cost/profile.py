"""A profile: what the passes of a model take on a machine, as curves that were fitted or modelled."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from drex.control.plan import FloatArray


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

    @cached_property
    def _arrays(self) -> tuple[FloatArray, FloatArray]:
        return np.array(self.counts), np.array(self.seconds)

    def at(self, count: FloatArray | np.float64) -> FloatArray:
        """Seconds at any counts; 0 at 0."""
        xs, ys = self._arrays
        out = np.asarray(np.interp(count, xs, ys))
        if len(xs) > 1:
            slope = max(0.0, float((ys[-1] - ys[-2]) / (xs[-1] - xs[-2])))
            out = np.asarray(out + slope * np.maximum(0.0, count - xs[-1]))
        else:
            out = np.asarray(out * np.maximum(1.0, count / xs[-1]))
        return np.where(count > 0, out, 0.0)

    def one(self, count: int) -> float:
        """As `at`, of one count: numpy takes many times as long for that. Kept, since counts come again and again."""
        found = self._known.get(count)
        if found is None:
            found = self._known[count] = self._one(count)
        return found

    @cached_property
    def _known(self) -> dict[int, float]:
        """Seconds of counts that were asked for."""
        return {}

    def _one(self, count: int) -> float:
        if count <= 0:
            return 0.0
        xs, ys = self.counts, self.seconds
        if count > xs[-1]:
            if len(xs) == 1:
                return ys[0] * count / xs[0]
            return ys[-1] + max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])) * (count - xs[-1])
        after = bisect_left(xs, count)
        if after == 0 or xs[after] == count:
            return ys[after]
        share = (count - xs[after - 1]) / (xs[after] - xs[after - 1])
        return ys[after - 1] + share * (ys[after] - ys[after - 1])


@dataclass(frozen=True)
class OwnCost:
    """What the engine itself takes of a step where passes wait for it, in seconds: a pass, and each request in it."""

    per_pass: float = 0.0
    per_request: float = 0.0

    def __post_init__(self) -> None:
        for seconds in (self.per_pass, self.per_request):
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{seconds} seconds of the engine's own: give a number from 0 on")

    def seconds(self, requests: int) -> float:
        """Of a pass over so many requests."""
        return self.per_pass + self.per_request * requests


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

    def seconds(self, rows: int, spans: int, entries: int, evaluations: int, kv_rows: int) -> float:
        """Seconds of a pass."""
        out = self.rows.one(rows) + self.head.one(evaluations)
        return out + self.span * max(0, spans - 1) + self.entry * entries + self.kv_row * kv_rows

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
        own: of the engine, once a pass whatever its segments, and once a request in it.
    """

    segments: tuple[SegmentCost, ...]
    threads: int | None = None
    source: str = ""
    own: OwnCost = OwnCost()

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
            own = data.get("own", {})
            own_cost = OwnCost(float(own.get("per_pass", 0.0)), float(own.get("per_request", 0.0)))
            return cls(segments, data.get("threads"), str(data.get("source", "")), own_cost)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a cost profile ({error!r}): make one with `drex profile`") from error

    def with_exits(self, kept: Sequence[int]) -> Profile:
        """The costs with only some of the exit points, by index: segments between them run as one, without a head."""
        edges = [-1, *kept, len(self.segments) - 1]
        groups = [self.segments[start + 1 : stop + 1] for start, stop in pairwise(edges)]
        return replace(self, segments=tuple(_joined(group) for group in groups))

    def scaled(self, factor: float) -> Profile:
        """All costs times a factor: a profile of another machine, or one that is wrong on purpose."""

        def curve(old: Curve) -> Curve:
            return Curve(old.counts, tuple(factor * value for value in old.seconds))

        segments = tuple(
            SegmentCost(curve(c.rows), curve(c.head), factor * c.span, factor * c.entry, factor * c.kv_row)
            for c in self.segments
        )
        own = OwnCost(factor * self.own.per_pass, factor * self.own.per_request)
        return replace(self, segments=segments, own=own)


def _joined(segments: Sequence[SegmentCost]) -> SegmentCost:
    """Segments that run as one."""
    counts = sorted({count for cost in segments for count in cost.rows.counts})
    at = np.array(counts)
    rows = np.sum([cost.rows.at(at) for cost in segments], axis=0)
    return SegmentCost(
        Curve(tuple(counts), tuple(map(float, rows))),
        segments[-1].head,
        sum(cost.span for cost in segments),
        sum(cost.entry for cost in segments),
        sum(cost.kv_row for cost in segments),
    )


def mean_cost(costs: Sequence[SegmentCost]) -> SegmentCost:
    """The mean of what was measured several times, at the same counts."""

    def curve(parts: Sequence[Curve]) -> Curve:
        assert len({part.counts for part in parts}) == 1
        return Curve(parts[0].counts, tuple(map(float, np.mean([part.seconds for part in parts], axis=0))))

    span, entry, kv_row = np.mean([(cost.span, cost.entry, cost.kv_row) for cost in costs], axis=0).tolist()
    return SegmentCost(curve([cost.rows for cost in costs]), curve([cost.head for cost in costs]), span, entry, kv_row)


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
