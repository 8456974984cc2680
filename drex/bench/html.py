"""The page of `drex bench`: one HTML file that needs nothing beside itself. Owns what of a report is shown, and how.

Any value of a report may be missing but a run's policy, in_flight and tokens_per_s: a chart without data is left out, a
cell without a value holds a dash. All that a report says passes through `esc`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from drex.bench.charts import (
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

POLICIES = ("drex", "full", "split", "art", "consensus", "majority", "greedy", "latency_only")
"""In the order of the charts; a policy's place decides its colour and marker, the same on every page."""
DASH, TIMES_SIGN = "\u2013", "\u00d7"
NONE, BAD = DASH, ' class="bad"'
TIMES = ("mean", "p50", "p95", "p99")
WIDE, NARROW = 940.0, 366.0
"""Charts are drawn twice, so that text keeps its size on a phone."""

STYLE = """
:root{color-scheme:light dark;--page:#fff;--soft:#f4f6f8;--ink:#14181f;--quiet:#566070;--grid:#e2e6eb;
--warn-page:#fff3cf;--warn:#9a6200;--shallow:#b3d8f2;--deep:#0b4a80;--own:#c3c9d1;
--c0:#0067b1;--c1:#4d5561;--c2:#c65408;--c3:#00795b;--c4:#a3448a;--c5:#5d4a00;--c6:#187fa8;--c7:#c22a3a}
@media(prefers-color-scheme:dark){:root{--page:#0f1216;--soft:#181d24;--ink:#e8ecf1;--quiet:#9aa5b4;--grid:#2a313b;
--warn-page:#2e240a;--warn:#f0bf4c;--shallow:#9ccbee;--deep:#2270b5;--own:#8b95a3;
--c0:#5cb1ff;--c1:#ccd2da;--c2:#f0823c;--c3:#35c79a;--c4:#ea80cc;--c5:#f0d25a;--c6:#45d3e8;--c7:#ff7d80}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 -apple-system,"Segoe UI",Inter,Roboto,
"Helvetica Neue",Arial,"Liberation Sans",sans-serif}
main{max-width:1000px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:clamp(1.6rem,4.5vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:.2em 0 .6em;text-wrap:balance}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:0 0 .2em}h3{font-size:.95rem;margin:0 0 2px}
section{margin-top:64px}p{max-width:70ch;margin:.3em 0 1em}.over,.how,dt,.facts span{color:var(--quiet)}
.over{margin:0;font-size:.9rem;font-weight:600}.how{font-size:.95rem}a{color:var(--c0)}
.label{display:inline-block;font-size:.9rem;padding:2px 10px;border-radius:99px;background:var(--soft)}
.warning{background:var(--warn-page);border-left:5px solid var(--warn);padding:12px 16px;margin:0 0 28px;max-width:none}
.warning strong{display:block;font-size:1.1rem;color:var(--warn)}.warning strong::first-letter{text-transform:uppercase}
.tag{white-space:nowrap;font-size:.85rem;color:var(--warn);background:var(--warn-page);padding:1px 8px;
border-radius:4px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:20px 28px;margin:28px 0 36px;padding:0}
.facts div{border-top:2px solid var(--ink);padding-top:8px}.facts b{display:block;font-size:1.7rem;line-height:1.2}
.facts span{font-size:.9rem}b,td,text,dd{font-variant-numeric:tabular-nums}
.about{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:20px 28px;font-size:.9rem}
.about h2{font-size:.9rem}dl{display:grid;grid-template-columns:auto 1fr;gap:1px 12px;margin:4px 0}
dd{margin:0;overflow-wrap:anywhere}svg{display:block;width:100%;height:auto;overflow:visible}.narrow{display:none}
.grid-of{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:24px 28px}
.grid-of svg{max-width:340px}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:0 0 8px;padding:0;font-size:.9rem}
.key i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:7px;vertical-align:-1px}
text{font-size:12.5px;fill:var(--quiet)}text.label,text.note{font-weight:600;fill:var(--ink)}
text.main{font-weight:700}text.reference{font-style:italic;font-weight:400}text.note{font-weight:400}
text.on-deep{fill:#fff}text.on-shallow{fill:#0d1b29}.grid{stroke:var(--grid)}.stroke{fill:none;stroke-width:1.8}
.main{stroke-width:3.2}.reference{stroke-dasharray:6 4;stroke-width:1.4}
.context{stroke-width:1.2;opacity:.3}.dots{stroke-width:1;opacity:.35}.whisker{stroke-width:4;opacity:.5}
.far{fill:none;stroke-width:1.2;opacity:.7}.leader{fill:none;stroke-width:1;opacity:.45}
.mark,.piece{stroke:var(--page);stroke-width:1}
.halo,text.label{paint-order:stroke;stroke:var(--page);stroke-width:4px;stroke-linejoin:round}text.halo{fill:var(--ink)}
.hit{fill:transparent}.hit:hover{fill:var(--ink);fill-opacity:.06}
.table{overflow-x:auto;margin:8px 0 32px;border-bottom:1px solid var(--grid)}
table{border-collapse:collapse;font-size:.85rem;white-space:nowrap;min-width:100%}
caption{text-align:left;font-weight:600;font-size:1rem;padding-bottom:6px;position:sticky;left:0}
th,td{padding:4px 7px;text-align:right;border-top:1px solid var(--grid)}th{font-weight:600}
thead th,thead td{color:var(--quiet);font-weight:400;border-top:0;vertical-align:bottom}thead .span{text-align:center}
tbody th:first-child,thead tr:last-child th:first-child{position:sticky;left:0;background:var(--page)}
tbody th:first-child,thead tr:last-child th:first-child,caption{text-align:left}
tr.first>*{border-top:1px solid var(--quiet)}td.bad{color:var(--warn);font-weight:700}
#tip{position:fixed;z-index:9;pointer-events:none;white-space:pre-line;max-width:300px;padding:7px 11px;
border-radius:6px;background:var(--ink);color:var(--page);font-size:.85rem;line-height:1.4;font-variant-numeric:tabular-nums}
@media(max-width:719px){main{padding:24px 12px 60px}.wide{display:none}.narrow{display:block}section{margin-top:48px}}
"""
SCRIPT = """
const tip = document.getElementById("tip");
// A drawing's title would pop up over every mark's own tip: screen readers get it as a label instead.
for (const t of document.querySelectorAll("svg>title")) {
  t.parentNode.setAttribute("aria-label", t.textContent);
  t.remove();
}
const show = e => {
  const at = e.target.closest?.("[data-tip]");
  tip.hidden = !at;
  if (!at) return;
  tip.textContent = at.dataset.tip;
  const below = e.clientY + tip.offsetHeight + 24 < innerHeight;
  tip.style.left = Math.max(8, Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (below ? e.clientY + 16 : e.clientY - tip.offsetHeight - 12) + "px";
};
addEventListener("pointermove", show);
addEventListener("pointerdown", show);
addEventListener("scroll", () => { tip.hidden = true }, { passive: true });
"""


def dig(value: Any, way: str) -> Any:
    """What stands at `rct_ms.p95` or `time.segments.0`; None where anything on the way is missing."""
    for step in way.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def real(value: Any, way: str = "") -> float | None:
    """A finite number found there, or None."""
    found = dig(value, way) if way else value
    good = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if good else None


def reals(values: Any) -> list[float]:
    """The finite numbers among them."""
    return [found for found in map(real, values or ()) if found is not None]


def number(value: Any) -> str:
    """About three digits that say something: 1,406, 85.2, 3.14, 0.0123."""
    found = real(value)
    if found is None:
        return NONE
    size = abs(found)
    return f"{found:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}" if size >= 1 else f"{found:.3g}"


def count(value: Any) -> str:
    """A whole number."""
    found = real(value)
    return NONE if found is None else f"{found:,.0f}"


def percent(value: Any) -> str:
    """A share."""
    found = real(value)
    return NONE if found is None else f"{100 * found:.1f} %"


def fine(value: Any) -> str:
    """Four places, for what differs in the third."""
    found = real(value)
    return NONE if found is None else f"{found:.4f}"


def several(values: Any) -> str:
    """Numbers side by side."""
    return " · ".join(number(one) for one in values or ()) or NONE


def plain(value: Any) -> str:
    """Anything from the report's head, as it stands."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(plain(one) for one in value) or NONE
    if isinstance(value, float):
        return f"{value:,.6g}"
    return NONE if value is None or value == "" else str(value)


@dataclass(frozen=True)
class _Story:
    """A report, asked the questions that the charts have."""

    report: dict[str, Any]
    runs: Sequence[dict[str, Any]]
    policies: Sequence[str]

    @classmethod
    def of(cls, report: dict[str, Any]) -> _Story:
        found = {str(run["policy"]) for run in report.get("runs") or ()}
        policies = [name for name in POLICIES if name in found] + sorted(found - set(POLICIES))
        order = {name: place for place, name in enumerate(policies)}
        runs = sorted(report.get("runs") or (), key=lambda run: (order[str(run["policy"])], run["in_flight"]))
        return cls(report, runs, policies)

    @property
    def trained(self) -> bool:
        return bool(self.report.get("label") == "trained model")

    def look(self, policy: str) -> tuple[str, int]:
        """Colour and marker."""
        known = [*POLICIES, *(name for name in self.policies if name not in POLICIES)].index(policy)
        return f"var(--c{known % 8})", known

    def having(self, way: str) -> dict[str, list[dict[str, Any]]]:
        """Runs with a number there, by policy."""
        groups = {
            p: [r for r in self.runs if str(r["policy"]) == p and real(r, way) is not None] for p in self.policies
        }
        return {policy: runs for policy, runs in groups.items() if runs}

    def widest(self, has: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
        """Of the runs that have it, those at the largest in-flight count."""
        found = [run for run in self.runs if has(run)]
        return [run for run in found if run["in_flight"] == max(run["in_flight"] for run in found)]

    def depths(self) -> list[str]:
        """Exit layers and the full depth, as the runs name them."""
        found = {key for run in self.runs for key in (run.get("exits") or {})}
        return sorted(found, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0, key))

    def segments(self) -> list[str]:
        """What to call each segment."""
        most = max((len(dig(run, "time.segments") or ()) for run in self.runs), default=0)
        ends = [0, *(self.report.get("exit_layers") or ()), self.report.get("num_layers")]
        if len(ends) != most + 1 or None in ends:
            return [f"segment {index}" for index in range(most)]
        return [f"layers {first + 1}{DASH}{last}" for first, last in pairwise(ends)]

    def full_depth(self, run: dict[str, Any]) -> float | None:
        """Full depth's throughput beside a run: the policy `full` where it ran, or what the run itself says."""
        ran = [r for r in self.runs if r["policy"] == "full" and r["in_flight"] == run["in_flight"]]
        return real(ran[0], "tokens_per_s") if ran else real(run, "full")


def _both(draw: Callable[[float], str]) -> str:
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def _key(names: Sequence[tuple[str, str]]) -> str:
    """What colours mean, in order, where pieces can be too small for their labels."""
    items = (f'<li><i style="background:{esc(color)}"></i>{esc(name)}</li>' for name, color in names)
    return f'<ul class="key">{"".join(items)}</ul>'


def _at(run: dict[str, Any]) -> float:
    """Where a run stands on a logarithmic axis."""
    return max(1.0, float(run["in_flight"]))


def _in_flight(runs: Iterable[dict[str, Any]]) -> Axis:
    return Axis("requests in flight", tuple(sorted({_at(run) for run in runs})), log=True)


def _speeds(story: _Story, relative: bool) -> list[Series]:
    """A line a policy, and the references; `relative` to full depth at the same in-flight count."""

    def at(run: dict[str, Any], way: str) -> Point:
        full = (story.full_depth(run) or math.inf) if relative else 1.0
        each = [value / full for value in reals(run.get("each"))] if way == "tokens_per_s" else []
        return Point(_at(run), run[way] / full, min(each, default=None), max(each, default=None))

    series = []
    for way, name in (("ideal", "ideal"), ("theta_star", "θ*"), ("full", "full depth")):
        # The references are drawn once: as drex's own runs state them, or the first policy's that do.
        runs = next(iter(story.having(way).values()), [])
        if runs and not (way == "full" and "full" in story.policies):
            series.append(Series(name, "var(--quiet)", [at(run, way) for run in runs], "reference"))
    for policy, runs in story.having("tokens_per_s").items():
        color, shape = story.look(policy)
        points = [at(run, "tokens_per_s") for run in runs]
        series.append(Series(policy, color, points, "main" if policy == "drex" else "line", shape))
    known = [replace(one, points=[point for point in one.points if point.y > 0]) for one in series]
    return [one for one in known if one.points]


def _lines(series: Sequence[Series], title: str, y: Axis, unit: str) -> str:
    """Lines against in-flight counts, named at their ends."""
    x = Axis("requests in flight", tuple(sorted({point.x for one in series for point in one.points})), log=True)
    tips = []
    for at in x.ticks:
        here = sorted(((point.y, one.label) for one in series for point in one.points if point.x == at), reverse=True)
        said = (f"{name}: {number(value)}{unit}" for value, name in here)
        tips.append((at, "\n".join([f"{at:g} in flight", *said])))

    def draw(width: float) -> str:
        letters, height = (16, 400.0) if width == WIDE else (12, 340.0)
        values = [f"  {number(one.points[-1].y)}{unit}" if width == WIDE else "" for one in series]
        named = [replace(s, label=shorten(s.label, letters) + value) for s, value in zip(series, values, strict=True)]
        frame = framed(x, y, width, height, 24 + LETTER * max(len(one.label) for one in named))
        body = [frame.axes(), *(one.draw(frame) for one in named), end_labels(frame, named), frame.columns(tips)]
        return svg(width, height, title, f"{y.label} of " + ", ".join(one.label for one in series), body)

    return _both(draw) if series else ""


def _throughput(story: _Story) -> str:
    speeds, gains = _speeds(story, relative=False), _speeds(story, relative=True)
    highest = [point.high or point.y for one in speeds for point in one.points]
    ratios = [1.0, *(point.y for one in gains for point in one.points)]
    drawn = _lines(speeds, "Throughput by policy", Axis.over("tokens/s", highest), "")
    return drawn + _lines(
        gains, "Throughput over full depth's", Axis.over("times full depth", ratios, zero=False), TIMES_SIGN
    )


def _latency(story: _Story) -> str:
    groups = story.having("rct_ms.mean")
    tops = [real(run, f"rct_ms.{time}") or 0.0 for runs in groups.values() for run in runs for time in TIMES]
    unit, scale = ("s", 1e-3) if max(tops, default=0.0) >= 10_000 else ("ms", 1.0)

    def point(run: dict[str, Any]) -> Point:
        mean, p95, p99 = (real(run, f"rct_ms.{time}") for time in ("mean", "p95", "p99"))
        assert mean is not None
        high, far = (None if value is None else value * scale for value in (p95, p99))
        return Point(_at(run), mean * scale, mean * scale, high, far)

    lines = {policy: [point(run) for run in runs] for policy, runs in groups.items()}
    means = {policy: [Point(one.x, one.y) for one in points] for policy, points in lines.items()}
    x = _in_flight(run for runs in groups.values() for run in runs)
    panels = []
    for policy, runs in groups.items():
        frame = framed(x, Axis.over(f"RCT, {unit}", [top * scale for top in tops], count=4), 300, 250, 14)
        tips: dict[float, str] = {}
        for run in runs:
            said = (f"{time}: {number(real(run, f'rct_ms.{time}'))} ms" for time in TIMES)
            tips[_at(run)] = "\n".join([f"{policy}, {_at(run):g} in flight", *said])
        color, shape = story.look(policy)
        others = [Series("", "var(--quiet)", line, "context") for name, line in means.items() if name != policy]
        drawn = [one.draw(frame) for one in [*others, Series(policy, color, lines[policy], "line", shape)]]
        body = [frame.axes(), *drawn, frame.columns(sorted(tips.items()))]
        picture = svg(300, 250, f"Request completion time, {policy}", "Mean, p95 and p99 against in flight", body)
        panels.append(f'<div><h3 style="color:{color}">{esc(policy)}</h3>{picture}</div>')
    return _panels(panels)


def _panels(panels: Sequence[str]) -> str:
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


def _time(story: _Story) -> str:
    names = [*story.segments(), "own time"]
    rows = []
    for run in story.widest(lambda run: real(run, "time.own") is not None or dig(run, "time.segments")):
        values = [real(run, f"time.segments.{index}") or 0.0 for index in range(len(names) - 1)]
        values.append(real(run, "time.own") or 0.0)
        rows.append(_row(run, values, names, "s", f"{number(sum(values))} s"))
    looks = [*_ramp(len(names) - 1), ("var(--own)", "on-shallow")]
    return _stacked("Where the time goes", "Seconds by segment and policy", rows, looks, names)


def _exits(story: _Story) -> str:
    depths = story.depths()
    names, rows = [f"layer {depth}" for depth in depths], []
    for run in story.widest(lambda run: any(real(one) for one in (run.get("exits") or {}).values())):
        values = [real(run, f"exits.{depth}") or 0.0 for depth in depths]
        row = _row(run, values, names, "tokens", f"mean {number(run.get('mean_depth'))}")
        rows.append(replace(row, values=[value / sum(values) for value in values]))
    return _stacked("Exits over layers", "Share of tokens by exit layer and policy", rows, _ramp(len(depths)), names)


def _occupancy(story: _Story) -> str:
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
        panels.append(f"<div><h3>{esc(name)}</h3>{drawn}</div>")
    return _panels(panels)


def _quality(story: _Story) -> str:
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


FIGURES: Sequence[tuple[str, Callable[[_Story], str], str, str]] = (
    ("Throughput", _throughput, "throughput",
     "Tokens per second of all requests together; upright bars span the repeats. Ideal: what no schedule of serial "
     "passes beats. θ*: the best that any flush rule could earn at these costs."),
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


def _figures(story: _Story) -> Iterable[str]:
    # Figures get copied out of their page: what they were measured on goes with each.
    tag = "" if story.trained else f' <span class="tag">{esc(plain(story.report.get("label")))}</span>'
    for title, draw, numbers, caption in FIGURES:
        drawn = draw(story)
        if drawn:
            more = f'{esc(caption)} <a href="#{numbers}">Numbers</a>{tag}'
            yield f'<section><h2>{title}</h2><p class="how">{more}</p>{drawn}</section>'


Column = tuple[str, str, Callable[[Any], str], str]
"""Group heading, heading, how to write the value, where it is."""


def _tables(story: _Story) -> Iterable[tuple[str, str, Sequence[Column]]]:
    """Anchor, caption and columns of each part of the full table."""
    ends = [("tokens by exit layer", depth, count, f"exits.{depth}") for depth in story.depths()]
    seconds = [("seconds in", name, number, f"time.segments.{at}") for at, name in enumerate(story.segments())]
    marks = ("token_agreement", "edit_similarity", "rouge_l", "loss", "loss_full")
    yield "throughput", "Throughput, tokens/s", [
        ("", "tokens/s", number, "tokens_per_s"), ("", "repeats", several, "each"), ("", "full depth", number, "full"),
        ("", "θ*", number, "theta_star"), ("", "ideal", number, "ideal"),
        ("", "efficiency", percent, "efficiency"), ("", "goodput", percent, "goodput"),
    ]  # fmt: skip
    kinds = ("rct", "ttft", "tpot", "itl")
    yield "latency", "Latency, ms", [(kind.upper(), at, number, f"{kind}_ms.{at}") for kind in kinds for at in TIMES]
    yield "exits", "Exits and decisions", [
        *ends, ("", "mean depth", number, "mean_depth"),
        ("involuntary", "exits", count, "involuntary_exits"), ("involuntary", "stays", count, "involuntary_stays"),
        ("", "confidence p5", fine, "confidence_p5"),
        ("decisions", "count", count, "decisions"), ("decisions", "accuracy", percent, "decision_accuracy"),
        ("cost error", "p50", percent, "cost_error.p50"), ("cost error", "p90", percent, "cost_error.p90"),
    ]  # fmt: skip
    yield "rest", "Time, slots and quality", [
        *seconds, ("seconds in", "own time", number, "time.own"),
        ("slots", "peak", count, "slots.peak"), ("slots", "capacity", count, "slots.capacity"),
        *(("quality", mark.replace("_", " "), fine, f"quality.{mark}") for mark in marks),
    ]  # fmt: skip


def _table(story: _Story, anchor: str, caption: str, columns: Sequence[Column]) -> str:
    groups = [(group, len(list(of))) for group, of in groupby(column[0] for column in columns)]
    spans = "".join(f'<th class="span" scope="colgroup" colspan="{wide}">{esc(group)}</th>' for group, wide in groups)
    over = f'<tr><td colspan="2"></td>{spans}</tr>' if any(group for group, _ in groups) else ""
    heads = "".join(f'<th scope="col">{esc(name)}</th>' for name in ("policy", "in flight", *(c[1] for c in columns)))
    body, before = [], None
    for run in story.runs:
        kind, before = "next" if run["policy"] == before else "first", run["policy"]
        cells = [f'<th scope="row">{esc(run["policy"])}</th><td>{count(run["in_flight"])}</td>']
        for _, _, write, way in columns:
            bad = way == "involuntary_exits" and (real(run, way) or 0) > 0
            cells.append(f"<td{BAD if bad else ''}>{esc(write(dig(run, way)))}</td>")
        body.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    return (
        f'<div class="table" id="{anchor}" tabindex="0" role="region" aria-label="{esc(caption)}"><table>'
        f"<caption>{esc(caption)}</caption><thead>{over}<tr>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _headline(story: _Story) -> tuple[str, str]:
    """The page's title, and the few numbers that answer for it."""
    widest = story.widest(lambda run: True)
    best = next((run for run in widest if run["policy"] == "drex"), None) or max(
        widest, key=lambda run: real(run, "tokens_per_s") or 0.0, default=None
    )
    if best is None:
        return "No runs", ""
    full, reached, best_rule = story.full_depth(best), real(best, "tokens_per_s"), real(best, "theta_star")
    gain = f"{reached / full:.2f}{TIMES_SIGN}" if full and reached else NONE
    facts = [
        (percent(best.get("efficiency")), "of ideal"),
        (percent(reached / best_rule if reached and best_rule else None), "of θ*"),
        (number(dig(best, "rct_ms.p95")), "ms RCT, p95"),
        (number(best.get("mean_depth")), f"mean depth, of {plain(story.report.get('num_layers'))} layers"),
        (count(best.get("involuntary_exits")), "involuntary exits"),
    ]
    items = "".join(f"<div><b>{esc(value)}</b><span>{esc(name)}</span></div>" for value, name in facts)
    title = f"{best['policy']}: {number(reached)} tokens/s at {count(best['in_flight'])} in flight"
    return title + (f", {gain} full depth" if gain != NONE else ""), f'<div class="facts">{items}</div>'


def _about(report: dict[str, Any]) -> str:
    """What was measured, on what and when."""
    served = {name: report.get(name) for name in ("model", "num_layers", "exit_layers", "criterion", "kv_fill")}
    groups = {
        "Machine": {**dict.fromkeys(("cpu", "cores", "threads", "device")), **(report.get("machine") or {})},
        "Model": served,
        "Workload": report.get("workload") or {},
        "Versions": report.get("versions") or {},
    }
    parts = []
    for title, facts in groups.items():
        items = []
        for name, value in facts.items():
            said = plain(value)
            if isinstance(value, list) and name.endswith("_tokens"):
                said = DASH.join(dict.fromkeys(plain(end) for end in value)) or NONE
            items.append(f"<dt>{esc(name.replace('_', ' '))}</dt><dd>{esc(said)}</dd>")
        parts.append(f"<div><h2>{title}</h2><dl>{''.join(items) or f'<dt>{NONE}</dt>'}</dl></div>")
    return f'<div class="about">{"".join(parts)}</div>'


def render(report: dict[str, Any]) -> str:
    """The page of a report in the JSON of `drex bench`, complete: no other file, no network."""
    story = _Story.of(report)
    title, facts = _headline(story)
    label = esc(plain(report.get("label")))
    said = "Timings are real; texts and quality are not: no trained model decided these exits."
    if not report.get("label"):
        said = "The report does not say whether a trained model decided these exits."
    banner = "" if story.trained else f'<p class="warning" role="note"><strong>{label}</strong>{said}</p>'
    badge = f'<p class="label">{label}</p>' if story.trained else ""
    head = (
        f'<meta charset="utf-8"><title>{esc(title)}</title><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style>'
    )
    date = esc(plain(report.get("date")).replace("T", " "))
    top = f'<p class="over">drex bench · {date}</p><h1>{esc(title)}</h1>{badge}'
    figures = "".join(_figures(story))
    tables = "".join(_table(story, *part) for part in _tables(story)) if story.runs else ""
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{banner}<header>{top}{facts}{_about(report)}'
        f"</header>{figures}<section><h2>All numbers</h2>{tables}</section></main>"
        f'<div id="tip" role="status" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )
