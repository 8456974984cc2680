"""Charts as SVG text: axes, points with whiskers, stacked bars and areas. Nothing here knows what a benchmark is.

Every drawing has a title and a description, and its marks carry `data-tip` texts for the page's script. Colours are CSS
values that may be variables, so that one drawing serves light and dark. All text passes through `esc`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

LINE = 15.0
"""Height of a line of text, in pixels of the drawing."""
LETTER = 7.3
"""Width of a letter: there is no font here to measure with, so a wide one is assumed."""
SHAPES = (
    "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z",
    "M-3.8 -3.8h7.6v7.6h-7.6z",
    "M0 -5.4L5.4 0L0 5.4L-5.4 0z",
    "M0 -5L4.9 3.8H-4.9z",
    "M0 5L4.9 -3.8H-4.9z",
    "M-1.7 -5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "M-5.2 0L-2.6 -4.5h5.2L5.2 0L2.6 4.5h-5.2z",
    "M-2.7 -5.2h5.4v10.4h-5.4z",
)
"""Outlines of markers round (0, 0): colour is never the only sign."""


def esc(value: object) -> str:
    """Text fit for HTML, attributes included."""
    return escape(str(value), quote=True)


def shorten(words: str, letters: int = 16) -> str:
    """At most so many letters."""
    return words if len(words) <= letters else words[: letters - 1] + "…"


def svg(width: float, height: float, title: str, desc: str, body: Iterable[str]) -> str:
    """A drawing that scales with its column."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img">'
        f"<title>{esc(title)}</title><desc>{esc(desc)}</desc>{''.join(body)}</svg>"
    )


def text(x: float, y: float, words: object, kind: str = "", anchor: str = "start", color: str = "") -> str:
    """One line of text; `kind` names CSS classes."""
    style = f' style="fill:{esc(color)}"' if color else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{style}>{esc(words)}</text>'


def path(d: str, kind: str, color: str = "", paint: str = "stroke", tip: str = "") -> str:
    """A path drawn in a colour; with a tip it answers the pointer."""
    style = f' style="{paint}:{esc(color)}"' if color else ""
    return f'<path class="{kind}" d="{d}"{style}' + (f' data-tip="{esc(tip)}"/>' if tip else "/>")


def rect(x: float, y: float, width: float, height: float, tip: str, kind: str = "hit", color: str = "") -> str:
    """A rectangle with a tip; by default an invisible one that catches the pointer."""
    return path(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z", kind, color, "fill", tip)


def blend(index: int, count: int) -> str:
    """The colour of step `index` of an ordered scale, from shallow to deep."""
    return f"color-mix(in oklab, var(--deep) {100 * index / max(count - 1, 1):.0f}%, var(--shallow))"


def on(index: int, count: int) -> str:
    """The CSS class of text that is legible on `blend(index, count)`."""
    return "on-deep" if index / max(count - 1, 1) > 0.55 else "on-shallow"


@dataclass(frozen=True)
class Axis:
    """Where values fall between 0 and 1, and which of them are marked; `log` is to base 2."""

    label: str
    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def over(cls, label: str, values: Iterable[float], zero: bool = True, count: int = 5, whole: bool = False) -> Axis:
        """A linear axis of round numbers; `whole` ones where only they make sense."""
        found = list(values) or [0.0, 1.0]
        low, high = (min(0.0, *found) if zero else min(found)), max(found)
        if high <= low:
            low, high = (low, low + 1) if zero else (low - 0.05, high + 0.05)
        rough = (high - low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
        step = max(1.0, math.ceil(step)) if whole else step
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(label, tuple(tick * step for tick in range(first, last + 1)))

    def at(self, value: float) -> float:
        """Its share of the way; a lone value stands near the labels on the right."""
        low, high = self.ticks[0], self.ticks[-1]
        if high <= low:
            return 0.9
        if self.log:
            return 0.04 + 0.92 * math.log2(max(value, low / 2) / low) / math.log2(high / low)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Frame:
    """The rectangle between two axes, in pixels."""

    x: Axis
    y: Axis
    left: float
    top: float
    right: float
    bottom: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Values to pixels."""
        across, up = self.x.at(x) * (self.right - self.left), self.y.at(y) * (self.bottom - self.top)
        return self.left + across, self.bottom - up

    def axes(self) -> str:
        """Grid, ticks and labels; the upright axis is named on top, where it reads without turning the head."""
        parts = [text(2, self.top - 14, self.y.label, "axis")]
        for tick in self.y.ticks:
            _, y = self.place(self.x.ticks[0], tick)
            parts.append(path(f"M{self.left:.1f} {y:.1f}H{self.right:.1f}", "grid"))
            parts.append(text(self.left - 8, y + 4, f"{tick:,.12g}", "tick", "end"))
        last = -math.inf
        for tick in self.x.ticks:
            x, label = self.place(tick, 0)[0], f"{tick:,.12g}"
            if x - last > LETTER * (len(label) + 1):
                parts.append(text(x, self.bottom + 18, label, "tick", "middle"))
                last = x
        return "".join([*parts, text(self.right, self.bottom + 36, self.x.label, "axis", "end")])

    def columns(self, tips: Sequence[tuple[float, str]]) -> str:
        """Invisible columns, each as wide as to halfway to the next, that tell all there is at one x."""
        at = [self.place(x, 0)[0] for x, _ in tips]
        edges = [self.left, *((a + b) / 2 for a, b in pairwise(at)), self.right]
        height = self.bottom - self.top
        return "".join(
            rect(a, self.top, b - a, height, tip) for (a, b), (_, tip) in zip(pairwise(edges), tips, strict=True)
        )


def framed(x: Axis, y: Axis, width: float, height: float, margin: float) -> Frame:
    """Axes in a drawing of this size, with `margin` on the right for labels."""
    left = 12 + LETTER * max(len(f"{tick:,.12g}") for tick in y.ticks)
    return Frame(x, y, left, 34, width - margin, height - 44)


@dataclass(frozen=True)
class Point:
    """A value with what it ranged over: `low` to `high` as a bar, on to `far` as a thin line."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    far: float | None = None
    tip: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one name. `kind` is the CSS class of its line: main, line, reference, context or dots."""

    label: str
    color: str
    points: Sequence[Point]
    kind: str = "line"
    shape: int | None = None

    def draw(self, frame: Frame) -> str:
        """Line, whiskers and markers."""
        at = [frame.place(point.x, point.y) for point in self.points]
        parts = [path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at), f"stroke {self.kind}", self.color)]
        for point, (x, y) in zip(self.points, at, strict=True):
            low, high, far = (
                v if v is None else frame.place(point.x, v)[1] for v in (point.low, point.high, point.far)
            )
            if low is not None and high is not None:
                parts.append(path(f"M{x:.1f} {low:.1f}V{high:.1f}", "whisker", self.color))
            if high is not None and far is not None:
                parts.append(path(f"M{x:.1f} {high:.1f}V{far:.1f}m-4 0h8", "far", self.color))
            if self.shape is not None:
                mark = path(SHAPES[self.shape % len(SHAPES)], "mark", self.color, "fill", point.tip)
                parts.append(f'<g transform="translate({x:.1f} {y:.1f})">{mark}</g>')
        return "".join(parts)


def end_labels(frame: Frame, series: Sequence[Series]) -> str:
    """Series named in the right margin, labels a line apart, with a leader from each one's last point."""
    ends = [(frame.place(one.points[-1].x, one.points[-1].y), one) for one in series if one.label]
    ends.sort(key=lambda end: end[0][1])
    # Down past the label above, then, where that ran off the drawing, up from the bottom.
    heights = list(accumulate((y for (_, y), _ in ends), lambda above, y: max(y, above + LINE)))
    limit = frame.bottom + LINE
    for index in reversed(range(len(heights))):
        limit = heights[index] = min(heights[index], limit - LINE)
    parts = []
    for ((x, y), one), height in zip(ends, heights, strict=True):
        edge = frame.right + 16
        parts.append(path(f"M{x + 7:.1f} {y:.1f}L{edge - 4:.1f} {height:.1f}", "leader", one.color))
        parts.append(text(edge, height + 4, one.label, f"label {one.kind}", color=one.color))
    return "".join(parts)


def near_labels(frame: Frame, series: Sequence[Series]) -> str:
    """Series named next to their last points, moved towards the middle until no marker and no label is there."""
    taken = [(x - 6, x + 6, y + 4) for one in series for x, y in (frame.place(p.x, p.y) for p in one.points)]
    parts = []
    for one in series:
        x, y = frame.place(one.points[-1].x, one.points[-1].y)
        width, height = LETTER * len(one.label), y + 4
        left = x + 9 if x + 9 + width < frame.right + 12 else x - 9 - width
        while any(abs(height - other) < LINE and left < end and start < left + width for start, end, other in taken):
            height += 4 if y < (frame.top + frame.bottom) / 2 else -4
        taken.append((left, left + width, height))
        if height != y + 4:
            parts.append(path(f"M{x:.1f} {y:.1f}L{left:.1f} {height - 4:.1f}", "leader", one.color))
        parts.append(text(left, height, one.label, "label", color=one.color))
    return "".join(parts)


@dataclass(frozen=True)
class Bar:
    """One row of a stacked chart: `values` are lengths, `says` what is written on each piece if there is room."""

    label: str
    values: Sequence[float]
    says: Sequence[tuple[str, str]]
    tips: Sequence[str]
    note: str


def bars(rows: Sequence[Bar], looks: Sequence[tuple[str, str]], width: float) -> tuple[float, list[str]]:
    """Stacked bars below each other, to one scale; `looks` are colour and text class a piece. The height they take."""
    left = 14 + LETTER * max(len(row.label) for row in rows)
    room = width - left - 16 - LETTER * max(len(row.note) for row in rows)
    longest = max(sum(row.values) for row in rows) or 1.0
    parts = []
    for number, row in enumerate(rows):
        x, y = left, 6 + 40 * number
        parts.append(text(left - 10, y + 19, row.label, "label", "end"))
        for value, says, tip, (color, kind) in zip(row.values, row.says, row.tips, looks, strict=True):
            length = room * value / longest
            if length > 0.2:
                parts.append(rect(x, y, length, 28, tip, "piece", color))
            fitting = next((word for word in says if word and LETTER * len(word) + 8 <= length), "")
            parts += [text(x + length / 2, y + 18.5, fitting, kind, "middle")] if fitting else []
            x += length
        parts.append(text(x + 10, y + 19, row.note, "note"))
    return 40 * len(rows) + 2, parts


def areas(frame: Frame, times: Sequence[float], layers: Sequence[Sequence[float]], names: Sequence[str]) -> list[str]:
    """Stacked steps, the first layer at the bottom, each named at its mean height."""

    def steps(values: Sequence[float]) -> list[tuple[float, float]]:
        ends = [*times[1:], times[-1]]
        return [frame.place(x, v) for a, b, v in zip(times, ends, values, strict=True) for x in (a, b)]

    sums = [[0.0] * len(times), *layers]
    stacked = list(accumulate(sums, lambda low, layer: [a + b for a, b in zip(low, layer, strict=True)]))
    parts, words, height = [], [], math.inf
    for index, (below, above) in enumerate(pairwise(stacked)):
        top, bottom = steps(above), steps(below)
        outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*top, *reversed(bottom)])
        parts.append(path(f"M{outline}z", "area", blend(index, len(layers)), "fill"))
        if any(layers[index]):
            height = min(sum(y for _, y in top + bottom) / len(top + bottom) + 4, height - LINE)
            words.append(text(frame.right - 4, height, names[index], "halo", "end"))
    return parts + words
