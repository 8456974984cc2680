"""The charts of run-ahead: how well it is known which drafts are right, and what becomes of them.

Empty where no policy drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from drex.comparison.fields import dig, real
from drex.report.charts import LETTER, Axis, Point, Series, end_labels, framed, svg
from drex.report.figures import in_flight, panel, place, side_by_side
from drex.report.story import Story, count, number, percent, reals

WIDTH, HEIGHT, MARGIN = 340.0, 250.0, 24 + LETTER * 11
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def _calibration(story: Story) -> str:
    panels = []
    for policy, runs in story.drafting().items():
        bins = _bins(runs)
        if not bins:
            continue
        color, shape = story.look(policy)
        accepted, learnt, tips = [], [], []
        for at, (verified, right, expected) in bins.items():
            share = right / verified
            error = (share * (1 - share) / verified) ** 0.5
            accepted.append(Point(at, share, max(0.0, share - error), min(1.0, share + error)))
            learnt.append(Point(at, expected / verified))
            said = f"accepted: {percent(share)}\nlearnt: {percent(expected / verified)}"
            tips.append((at, f"{policy}, confidence about {at:g}\n{count(verified)} drafts\n{said}"))
        frame = framed(Axis("confidence", SHARES), Axis("share of drafts accepted", SHARES), WIDTH, HEIGHT, MARGIN)
        series = [
            Series("learnt", "var(--quiet)", learnt, "reference"),
            Series("accepted", color, accepted, "line", shape),
        ]
        drawn = [frame.axes(), *(one.draw(frame) for one in series), end_labels(frame, series), frame.columns(tips)]
        picture = svg(WIDTH, HEIGHT, f"Acceptance of drafts, {policy}", "As learnt and as it was, by confidence", drawn)
        panels.append(panel(policy, picture, color))
    return side_by_side(panels)


def _bins(runs: Sequence[Mapping[str, Any]]) -> dict[float, list[float]]:
    """Drafts verified, accepted, and expected to be, by confidence: of all runs together."""
    sums: dict[float, list[float]] = {}
    for run in runs:
        for each in run["run_ahead"].get("calibration") or ():
            found = reals(dig(each, name) for name in ("confidence", "verified", "accepted", "expected"))
            if len(found) == 4 and found[1] > 0:
                at, *more = found
                sums[at] = [a + b for a, b in zip(sums.get(at, (0.0, 0.0, 0.0)), more, strict=True)]
    return dict(sorted(sums.items()))


KINDS = (("drafted", "line"), ("accepted", "main"), ("rolled back", "reference"))
"""What becomes of drafts, and how its line looks."""


def _outcomes(story: Story) -> str:
    groups = {policy: found for policy, runs in story.drafting().items() if (found := [r for r in runs if _made(r)])}
    x = in_flight(run for runs in groups.values() for run in runs)
    heights = [_rate(run, name) for runs in groups.values() for run in runs for name, _ in KINDS]
    y = Axis.over("rows per output token", heights)
    panels = []
    for policy, runs in groups.items():
        color, _ = story.look(policy)
        series = [
            Series(name, color, [Point(place(run), _rate(run, name)) for run in runs], kind, shape)
            for shape, (name, kind) in enumerate(KINDS)
        ]
        tips = []
        for run in runs:
            said = (f"{name}: {count(_rows(run, name))}, {number(_rate(run, name))} a token" for name, _ in KINDS)
            tips.append((place(run), "\n".join([f"{policy}, {run['in_flight']} in flight", *said])))
        frame = framed(x, y, WIDTH, HEIGHT, MARGIN)
        drawn = [frame.axes(), *(one.draw(frame) for one in series), end_labels(frame, series), frame.columns(tips)]
        about = "Rows drafted, accepted and rolled back for each output token"
        panels.append(panel(policy, svg(WIDTH, HEIGHT, f"What becomes of drafts, {policy}", about, drawn), color))
    return side_by_side(panels)


def _made(run: Mapping[str, Any]) -> float:
    """Output tokens of a run."""
    return sum(real(tokens) or 0.0 for tokens in (run.get("exits") or {}).values())


def _rows(run: Mapping[str, Any], name: str) -> float:
    return real(run, f"run_ahead.{name.replace(' ', '_')}") or 0.0


def _rate(run: Mapping[str, Any], name: str) -> float:
    return _rows(run, name) / _made(run)


DRAFT_FIGURES: Sequence[tuple[str, Callable[[Story], str], str, str]] = (
    ("Which drafts are right", _calibration, "exits",
     "Run-ahead: share of the tentative tokens that a deeper head said too, by the confidence of the exit head that "
     "took them, at all in-flight counts together; bars span one standard error. Dashed: the chance that they were "
     "given, which is learnt while serving and decides which rows are started."),
    ("What becomes of drafts", _outcomes, "exits",
     "Run-ahead: rows for each output token that were started on a tentative token, whose token was right, and that "
     "were taken back with a wrong one. A row is drafted only where it pays."),
)  # fmt: skip
"""As `figures.FIGURES`."""
