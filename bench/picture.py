"""Pictures for the documentation: SVG files that need nothing beside themselves, on light pages and on dark ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from drex.report.charts import LETTER, SHAPES, Axis, Point, Series, framed, path, svg, text
from drex.report.style import COLOURS, DRAWING, FONT

WIDTH, HEIGHT, PAD, LINE = 920.0, 300.0, 12.0, 17.0
ACROSS = 3
"""Panels in a row, at most."""
STYLE = f"""{COLOURS}{DRAWING}text{{font-family:{FONT}}}text.title{{font-size:15px;font-weight:700;fill:var(--ink)}}
.dotted{{stroke-dasharray:1.5 4}}
"""
LOOKS: Mapping[str, tuple[str, str, str, int | None]] = {
    "ideal": ("ideal", "var(--quiet)", "reference dotted", None),
    "theta_star": ("θ*", "var(--ink)", "reference", None),
    "full": ("full depth", "var(--c3)", "line", 3),
    "fixed": ("flush at b", "var(--c1)", "line", None),
    "split": ("split: flush at once", "var(--c4)", "line", 4),
    "art": ("art", "var(--c5)", "line", 5),
    "consensus": ("consensus", "var(--c6)", "line", 6),
    "drex+adaptive": ("drex, adaptive", "var(--c7)", "line", 7),
    "drex": ("drex", "var(--c0)", "main", 0),
    "drex+run-ahead": ("drex, trusted run-ahead", "var(--c1)", "line", 1),
    "drex+lossless": ("drex, lossless run-ahead", "var(--c2)", "line", 2),
    "drex+lossless+adaptive": ("drex, lossless run-ahead, adaptive", "var(--c2)", "line", 2),
}
"""Label, colour, line and marker; policies look as on the page of `drex bench`."""
Rows = Sequence[tuple[float, Mapping[str, Sequence[float]]]]
"""At each x, by name: the value and, behind it, the repeats that it sums up."""


@dataclass(frozen=True)
class Panel:
    """One of several drawings side by side."""

    heading: str
    x: Axis
    series: Sequence[Series]


def lines(rows: Rows) -> list[Series]:
    """A line a name, in the order of `LOOKS`; what the repeats ranged over is an upright bar."""
    found: dict[str, list[Point]] = {}
    for x, values in rows:
        for name, (value, *each) in values.items():
            found.setdefault(name, []).append(Point(x, value, min(each, default=None), max(each, default=None)))
    looks = ((found[name], look) for name, look in LOOKS.items() if name in found)
    return [Series(label, color, points, kind, shape) for points, (label, color, kind, shape) in looks]


def over_counts(heading: str, rows: Rows) -> Panel:
    """Lines over counts in flight."""
    return Panel(heading, Axis("N, requests in flight", tuple(count for count, _ in rows), log=True), lines(rows))


def picture(title: str, unit: str, panels: Sequence[Panel], source: Sequence[str]) -> str:
    """The file: panels to one scale, a legend above them, and below where the numbers are from, a text a line."""
    every = [one for panel in panels for one in panel.series]
    seen = chain.from_iterable((point.y, point.low, point.high) for one in every for point in one.points)
    y = Axis.over(unit, [value for value in seen if value is not None], zero=False)
    words, top = _legend({one.label: one for one in every})
    parts = [f"<style>{STYLE}</style>", path("M0 0h4000v4000h-4000z", "paper", "var(--page)", "fill")]
    parts += [text(PAD, 26, title, "title"), *words]
    columns = min(ACROSS, len(panels))
    width = (WIDTH - 2 * PAD) / columns
    for number, panel in enumerate(panels):
        down, across = divmod(number, columns)
        frame = framed(panel.x, y, width, HEIGHT, 14)
        drawn = [text(2, 0, panel.heading, "label"), frame.axes(), *(one.draw(frame) for one in panel.series)]
        at = f"{PAD + across * width:g} {top + 30 + down * (HEIGHT + 20):g}"
        parts.append(f'<g transform="translate({at})">{"".join(drawn)}</g>')
    height = top + 44 + (HEIGHT + 20) * math.ceil(len(panels) / columns) - 20
    for line in source:
        parts.append(text(PAD, height, line, "tick"))
        height += LINE
    about = "; ".join(f"{panel.heading}: {', '.join(one.label for one in panel.series)}" for panel in panels)
    drawing = svg(WIDTH, height, title, f"{unit}. {about}", parts)
    size = f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH:g}" height="{height:g}"'
    return drawing.replace("<svg ", f"<svg {size} ", 1) + "\n"


def _legend(known: Mapping[str, Series]) -> tuple[list[str], float]:
    """Line, marker and label of each, as many in a row as fit; and how far down it reaches."""
    parts, x, y = [], PAD, 50.0
    for label, one in known.items():
        length = 50 + LETTER * len(label)
        if x + length > WIDTH:
            x, y = PAD, y + 20
        parts.append(path(f"M{x:g} {y - 4:g}h28", f"stroke {one.kind}", one.color))
        if one.shape is not None:
            mark = path(SHAPES[one.shape], "mark", one.color, "fill")
            parts.append(f'<g transform="translate({x + 14:g} {y - 4:g})">{mark}</g>')
        parts.append(text(x + 35, y, label, "note"))
        x += length
    return parts, y
