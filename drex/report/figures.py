"""The charts of the benchmark page: which numbers of a report each shows. A chart without data is an empty string."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from drex.comparison.fields import dig, real
from drex.report.charts import (
    LETTER,
    Axis,
    Bar,
    Point,
    Series,
    areas,
    bars,
    blend,
    end_labels,
    esc,
    framed,
    near_labels,
    on,
    shorten,
    svg,
)
from drex.report.story import TIMES, Story, fine, number, reals, times

WIDE, NARROW = 940.0, 366.0
"""Charts are drawn twice, so that text keeps its size on a phone."""


def _both(draw: Callable[[float], str]) -> str:
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def _key(names: Sequence[tuple[str, str]]) -> str:
    """What colours mean, in order, where pieces can be too small for their labels."""
    items = (f'<li><i style="background:{esc(color)}"></i>{esc(name)}</li>' for name, color in names)
    return f'<ul class="key">{"".join(items)}</ul>'


def place(run: dict[str, Any]) -> float:
    """Where a run stands on a logarithmic axis."""
    return max(1.0, float(run["in_flight"]))


def in_flight(runs: Iterable[dict[str, Any]]) -> Axis:
    """The axis of their counts in flight."""
    return Axis("requests in flight", tuple(sorted({place(run) for run in runs})), log=True)


def _speeds(story: Story, rate: str, relative: bool) -> list[Series]:
    """A line a policy, and the references of that rate; `relative` to full depth at the same in-flight count."""

    def at(run: dict[str, Any], way: str) -> Point:
        full = (story.full_depth(run, rate) or math.inf) if relative else 1.0
        each = [value / full for value in reals(run.get("each"))] if way == "tokens_per_s" else []
        return Point(place(run), run[way] / full, min(each, default=None), max(each, default=None))

    series = []
    for way, name in (("ideal", "ideal"), ("theta_star", "θ*"), ("full", "full depth")):
        # The references are drawn once: as drex's own runs state them, or the first policy's that do.
        runs = next(iter(story.having(way).values()), [])
        if runs and rate == story.rate and not (way == "full" and "full" in story.policies):
            series.append(Series(name, "var(--quiet)", [at(run, way) for run in runs], "reference"))
    for policy, runs in story.having(rate).items():
        color, shape = story.look(policy)
        points = [at(run, rate) for run in runs]
        series.append(Series(policy, color, points, "main" if policy == "drex" else "line", shape))
    known = [replace(one, points=[point for point in one.points if point.y > 0]) for one in series]
    return [one for one in known if one.points]


def _lines(series: Sequence[Series], title: str, y: Axis, write: Callable[[float], str]) -> str:
    """Lines against in-flight counts, named at their ends."""
    x = Axis("requests in flight", tuple(sorted({point.x for one in series for point in one.points})), log=True)
    tips = []
    for at in x.ticks:
        here = sorted(((point.y, one.label) for one in series for point in one.points if point.x == at), reverse=True)
        said = (f"{name}: {write(value)}" for value, name in here)
        tips.append((at, "\n".join([f"{at:g} in flight", *said])))

    def draw(width: float) -> str:
        letters, height = (16, 400.0) if width == WIDE else (12, 340.0)
        values = [f"  {write(one.points[-1].y)}" if width == WIDE else "" for one in series]
        named = [replace(s, label=shorten(s.label, letters) + value) for s, value in zip(series, values, strict=True)]
        frame = framed(x, y, width, height, 24 + LETTER * max(len(one.label) for one in named))
        body = [frame.axes(), *(one.draw(frame) for one in named), end_labels(frame, named), frame.columns(tips)]
        return svg(width, height, title, f"{y.label} of " + ", ".join(one.label for one in series), body)

    return _both(draw) if series else ""


def _throughput(story: Story) -> str:
    speeds, gains = _speeds(story, "tokens_per_s", relative=False), _speeds(story, story.rate, relative=True)
    y = Axis.over("tokens/s", [point.high or point.y for one in speeds for point in one.points])
    drawn = _lines(speeds, "Throughput by policy", y, number)
    label = "times full depth" + (", decoding alone" if story.rate != "tokens_per_s" else "")
    y = Axis.over(label, [1.0, *(point.y for one in gains for point in one.points)], zero=False)
    return drawn + _lines(gains, "Throughput over full depth's", y, times)


def _latency(story: Story) -> str:
    groups = story.having("rct_ms.mean")
    tops = [real(run, f"rct_ms.{time}") or 0.0 for runs in groups.values() for run in runs for time in TIMES]
    unit, scale = ("s", 1e-3) if max(tops, default=0.0) >= 10_000 else ("ms", 1.0)

    def point(run: dict[str, Any]) -> Point:
        mean, p95, p99 = (real(run, f"rct_ms.{time}") for time in ("mean", "p95", "p99"))
        assert mean is not None
        high, far = (None if value is None else value * scale for value in (p95, p99))
        return Point(place(run), mean * scale, mean * scale, high, far)

    lines = {policy: [point(run) for run in runs] for policy, runs in groups.items()}
    means = {policy: [Point(one.x, one.y) for one in points] for policy, points in lines.items()}
    x = in_flight(run for runs in groups.values() for run in runs)
    panels = []
    for policy, runs in groups.items():
        frame = framed(x, Axis.over(f"RCT, {unit}", [top * scale for top in tops], count=4), 300, 250, 14)
        tips: dict[float, str] = {}
        for run in runs:
            said = (f"{time}: {number(real(run, f'rct_ms.{time}'))} ms" for time in TIMES)
            tips[place(run)] = "\n".join([f"{policy}, {place(run):g} in flight", *said])
        color, shape = story.look(policy)
        others = [Series("", "var(--quiet)", line, "context") for name, line in means.items() if name != policy]
        drawn = [one.draw(frame) for one in [*others, Series(policy, color, lines[policy], "line", shape)]]
        body = [frame.axes(), *drawn, frame.columns(sorted(tips.items()))]
        picture = svg(300, 250, f"Request completion time, {policy}", "Mean, p95 and p99 against in flight", body)
        panels.append(panel(policy, picture, color))
    return side_by_side(panels)


def panel(heading: str, drawn: str, color: str = "") -> str:
    """A small drawing under its heading."""
    style = f' style="color:{esc(color)}"' if color else ""
    return f"<div><h3{style}>{esc(heading)}</h3>{drawn}</div>"


def side_by_side(panels: Sequence[str]) -> str:
    """Small drawings, as many in a row as fit."""
    return f'<div class="grid-of">{"".join(panels)}</div>' if panels else ""


def _stacked(
    title: str, about: str, rows: Sequence[Bar], looks: Sequence[tuple[str, str]], names: Sequence[str]
) -> str:
    """Bars with their key."""

    def draw(width: float) -> str:
        height, body = bars(rows, looks, width)
        return svg(width, height, title, about, body)

    colors = [color for color, _ in looks]
    return _key(list(zip(names, colors, strict=True))) + _both(draw) if rows else ""


def _ramp(steps: int) -> list[tuple[str, str]]:
    return [(blend(index, steps), on(index, steps)) for index in range(steps)]


def _row(run: dict[str, Any], values: Sequence[float], names: Sequence[str], unit: str, note: str) -> Bar:
    """A run's bar: pieces say their share, and their name where there is room."""
    policy, total = shorten(str(run["policy"]), 13), sum(values) or 1.0
    shares = [f"{100 * value / total:.0f} %" for value in values]
    says = [(f"{name} · {share}", share) for name, share in zip(names, shares, strict=True)]
    told = zip(names, values, shares, strict=True)
    tips = [f"{run['policy']}\n{name}: {number(value)} {unit}, {share}" for name, value, share in told]
    return Bar(policy, values, says, tips, note)


def _time(story: Story) -> str:
    names = [*story.segments(), "own time"]
    rows = []
    for run in story.widest(lambda run: real(run, "time.own") is not None or dig(run, "time.segments")):
        values = [real(run, f"time.segments.{index}") or 0.0 for index in range(len(names) - 1)]
        values.append(real(run, "time.own") or 0.0)
        # Full depth has no exit points: all its layers are one segment.
        whole = ["all layers", *names[1:]] if run["policy"] == "full" and not any(values[1:-1]) else names
        rows.append(_row(run, values, whole, "s", f"{number(sum(values))} s"))
    looks = [*_ramp(len(names) - 1), ("var(--own)", "on-shallow")]
    return _stacked("Where the time goes", "Seconds by segment and policy", rows, looks, names)


def _exits(story: Story) -> str:
    depths = story.depths()
    names, rows = [f"layer {depth}" for depth in depths], []
    for run in story.widest(lambda run: any(real(one) for one in (run.get("exits") or {}).values())):
        values = [real(run, f"exits.{depth}") or 0.0 for depth in depths]
        row = _row(run, values, names, "tokens", f"mean {number(run.get('mean_depth'))}")
        rows.append(replace(row, values=[value / sum(values) for value in values]))
    return _stacked("Exits over layers", "Share of tokens by exit layer and policy", rows, _ramp(len(depths)), names)


def _occupancy(story: Story) -> str:
    panels = []
    for run in (run for run in story.runs if str(run["policy"]).startswith("drex")):
        kept = [reals(row) for row in run.get("occupancy") or ()]
        kept = [row for row in kept if len(row) > 1 and len(row) == len(kept[0])]
        step = math.ceil(len(kept) / 90) or 1
        chunks = [kept[at : at + step] for at in range(0, len(kept), step)]
        thin = [[sum(column) / len(chunk) for column in zip(*chunk, strict=True)] for chunk in chunks]
        if len(thin) < 2 or thin[0][0] == thin[-1][0] or not any(sum(row[1:]) for row in thin):
            continue
        times, layers = [row[0] - kept[0][0] for row in thin], list(zip(*(row[1:] for row in thin), strict=True))
        at = story.report.get("exit_layers") or ()
        names = [f"after layer {at[i]}" if i < len(at) and at[i] else f"exit point {i + 1}" for i in range(len(layers))]
        y = Axis.over("rows waiting", [sum(row[1:]) for row in thin], count=4, whole=True)
        frame = framed(Axis.over("seconds", times), y, 300, 220, 14)
        told = []
        for time, row in zip(times, thin, strict=True):
            said = (f"{name}: {number(value)}" for name, value in zip(names, row[1:], strict=True))
            told.append((time, "\n".join([f"{time:.3g} s", *said])))
        body = [frame.axes(), *areas(frame, times, layers, names), frame.columns(told)]
        name = f"{run['policy']}, {run['in_flight']} in flight"
        drawn = svg(300, 220, f"Buffer occupancy, {name}", "Rows waiting at each exit point over time", body)
        panels.append(panel(name, drawn))
    return side_by_side(panels)


def _quality(story: Story) -> str:
    series = []
    for policy, runs in story.having("quality.token_agreement").items():
        color, shape = story.look(policy)
        points = [
            Point(
                run["tokens_per_s"],
                run["quality"]["token_agreement"],
                tip=f"{policy}, {run['in_flight']} in flight\n{number(run['tokens_per_s'])} tokens/s\n"
                f"token agreement {fine(run['quality']['token_agreement'])}",
            )
            for run in runs
        ]
        series.append(Series(policy, color, points, "dots", shape))
    points = [point for one in series for point in one.points]
    x = Axis.over("tokens/s", [point.x for point in points])
    y = Axis.over("token agreement with full depth", [1.0, *(point.y for point in points)], zero=False)

    def draw(width: float) -> str:
        frame = framed(x, y, width, 320, 24)
        body = [frame.axes(), *(one.draw(frame) for one in series), near_labels(frame, series)]
        return svg(width, 320, "Quality against throughput", "Token agreement against tokens per second", body)

    return _both(draw) if series else ""


FIGURES: Sequence[tuple[str, Callable[[Story], str], str, str]] = (
    ("Throughput", _throughput, "throughput",
     "Tokens per second of all requests together, upright bars spanning the repeats; below over full depth's. "
     "Ideal: what no schedule of serial passes beats. θ*: the best that any flush rule could earn at these costs."),
    ("Request completion time", _latency, "latency",
     "From arrival to last token. The line is the mean; the bar reaches p95, the thin line p99. Grey: the means of the "
     "other policies. All panels have one scale."),
    ("Where the time goes", _time, "rest",
     "Seconds of the run that went into each segment's passes, and the engine's own time around them, at the largest "
     "in-flight count."),
    ("What waits", _occupancy, "rest",
     "Rows in the rebatching buffers over time, stacked by the exit point behind which they wait."),
    ("Where tokens leave", _exits, "exits",
     "Share of the tokens by the layer after which they were emitted, at the largest in-flight count; beside it the "
     "mean depth in layers."),
    ("What it costs in quality", _quality, "rest",
     "Share of the tokens that equal full depth's, against throughput: up and to the right is better. A faint line "
     "joins a policy's in-flight counts."),
)  # fmt: skip
"""Heading, drawing, the table that holds its numbers, and how to read it."""
