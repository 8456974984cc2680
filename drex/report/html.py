"""The page of `drex bench`: one HTML file that needs nothing beside itself. Owns what of a report is shown, and how.

Any value of a report may be missing but a run's policy, in_flight and tokens_per_s: a chart without data is left out, a
cell without a value holds a dash. All that a report says passes through `esc`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from drex.comparison.fields import dig, real
from drex.comparison.verdict import MODELLED, SERVED, doubts, verdict
from drex.report.charts import esc
from drex.report.draft_figures import DRAFT_FIGURES
from drex.report.figures import FIGURES
from drex.report.story import DASH, NONE, TIMES, Story, count, fine, number, percent, plain, several, times
from drex.report.style import COLOURS, DRAWING, FONT

BAD = ' class="bad"'
MODELLED_TIMES = "times are modelled, not measured"
LAYOUT = """
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 FONT}
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
.facts span{font-size:.9rem}b,td,dd{font-variant-numeric:tabular-nums}
.about{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:20px 28px;font-size:.9rem}
.about h2{font-size:.9rem}dl{display:grid;grid-template-columns:auto 1fr;gap:1px 12px;margin:4px 0}
dd{margin:0;overflow-wrap:anywhere}svg{display:block;width:100%;height:auto;overflow:visible}.narrow{display:none}
.grid-of{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:24px 28px}
.grid-of svg{max-width:340px}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:0 0 8px;padding:0;font-size:.9rem}
.key i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:7px;vertical-align:-1px}
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
STYLE = COLOURS + DRAWING + LAYOUT.replace("FONT", FONT)
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


def _figures(story: Story) -> Iterable[str]:
    # Figures get copied out of their page: what they were measured on goes with each.
    modelled = story.report.get("timing") == MODELLED
    label = MODELLED_TIMES if modelled else plain(story.report.get("label"))
    tag = "" if story.trained and not modelled else f' <span class="tag">{esc(label)}</span>'
    for title, draw, numbers, caption in (*FIGURES, *DRAFT_FIGURES):
        drawn = draw(story)
        if drawn:
            more = f'{esc(caption)} <a href="#{numbers}">Numbers</a>{tag}'
            yield f'<section><h2>{title}</h2><p class="how">{more}</p>{drawn}</section>'


Column = tuple[str, str, Callable[[Any], str], str]
"""Group heading, heading, how to write the value, where it is."""


def _tables(story: Story) -> Iterable[tuple[str, str, Sequence[Column]]]:
    """Anchor, caption and columns of each part of the full table."""
    ends = [("tokens by exit layer", depth, count, f"exits.{depth}") for depth in story.depths()]
    seconds = [("seconds in", name, number, f"time.segments.{at}") for at, name in enumerate(story.segments())]
    marks = ("token_agreement", "edit_similarity", "rouge_l", "loss", "loss_full")
    yield "throughput", "Throughput, tokens/s", [
        ("", "tokens/s", number, "tokens_per_s"), ("", "repeats", several, "each"),
        ("", "decoding alone", number, "decode_tokens_per_s"), ("", "full depth", number, "full"),
        ("", "θ*", number, "theta_star"), ("", "ideal", number, "ideal"),
        ("", "efficiency", percent, "efficiency"), ("", "goodput", percent, "goodput"),
    ]  # fmt: skip
    kinds = ("rct", "ttft", "tpot", "itl")
    yield "latency", "Latency, ms", [(kind.upper(), at, number, f"{kind}_ms.{at}") for kind in kinds for at in TIMES]
    named = ("drafted", "verified", "accepted", "rolled_back")
    drafts: list[Column] = [("drafts", name.replace("_", " "), count, f"run_ahead.{name}") for name in named]
    drafts.append(("drafts", "calibration error", percent, "run_ahead.calibration_error"))
    drafts.append(("", "tokens a flush", number, "run_ahead.tokens_per_flush"))
    yield "exits", "Exits and decisions", [
        *ends, ("", "mean depth", number, "mean_depth"),
        ("involuntary", "exits", count, "involuntary_exits"), ("involuntary", "stays", count, "involuntary_stays"),
        ("", "confidence p5", fine, "confidence_p5"),
        ("decisions", "count", count, "decisions"), ("decisions", "accuracy", percent, "decision_accuracy"),
        ("cost error", "p50", percent, "cost_error.p50"), ("cost error", "p90", percent, "cost_error.p90"),
        *(drafts if story.drafting() else ()),
    ]  # fmt: skip
    yield "rest", "Time, slots and quality", [
        *seconds, ("seconds in", "own time", number, "time.own"),
        ("slots", "peak", count, "slots.peak"), ("slots", "capacity", count, "slots.capacity"),
        ("", "preemptions", count, "preemptions"),
        ("deadlines", "late", count, "late"), ("deadlines", "infeasible", count, "infeasible"),
        *(("quality", mark.replace("_", " "), fine, f"quality.{mark}") for mark in marks),
    ]  # fmt: skip


def _table(story: Story, anchor: str, caption: str, columns: Sequence[Column]) -> str:
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


def _headline(story: Story) -> tuple[str, str]:
    """The page's title, and the few numbers that answer for it."""
    widest = story.widest(lambda run: True)
    served = (next((run for run in widest if run["policy"] == name), None) for name in SERVED)
    best = next(filter(None, served), None) or max(
        widest, key=lambda run: real(run, "tokens_per_s") or 0.0, default=None
    )
    if best is None:
        return "No runs", ""
    reached, full = real(best, "tokens_per_s"), story.full_depth(best, "tokens_per_s")
    rate, optimum = real(best, story.rate), real(best, "theta_star")
    gain = times(reached / full) if full and reached else NONE
    facts = [
        (percent(best.get("efficiency")), "of ideal"),
        (percent(rate / optimum if rate and optimum else None), "of θ*"),
        (number(dig(best, "rct_ms.p95")), "ms RCT, p95"),
        (number(best.get("mean_depth")), f"mean depth, of {plain(story.report.get('num_layers'))} layers"),
        (count(best.get("involuntary_exits")), "involuntary exits"),
    ]
    items = "".join(f"<div><b>{esc(value)}</b><span>{esc(name)}</span></div>" for value, name in facts)
    title = f"{best['policy']}: {number(reached)} tokens/s at {count(best['in_flight'])} in flight"
    return title + (f", {gain} full depth" if gain != NONE else ""), f'<div class="facts">{items}</div>'


def _about(report: dict[str, Any]) -> str:
    """What was measured, on what and when."""
    named = ("model", "num_layers", "exit_layers", "criterion", "thresholds", "kv_fill", "dtype")
    served = {name: report.get(name) for name in named}
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


def _warnings(story: Story) -> str:
    """Warnings above the numbers: that times are modelled, exits made up, or the machine was busy."""
    report = story.report
    said = []
    if report.get("timing") == MODELLED:
        about = (
            "The engine's own scheduling ran in virtual time, on what passes cost by the model of a machine, or by a "
        )
        said.append((MODELLED_TIMES, about + "profile; exits were drawn or recorded, and no text was made."))
    elif not story.trained:
        about = "Timings are real; texts and quality are not: no trained model decided these exits."
        if not report.get("label"):
            about = "The report does not say whether a trained model decided these exits."
        said.append((plain(report.get("label")), about))
    doubt = doubts(report)
    if doubt is not None:
        said.append(("times are not to be trusted", doubt))
    notes = (f"<strong>{esc(head)}</strong>{esc(about)}" for head, about in said)
    return "".join(f'<p class="warning" role="note">{note}</p>' for note in notes)


def render(report: dict[str, Any]) -> str:
    """The page of a report in the JSON of `drex bench`, complete: no other file, no network."""
    story = Story.of(report)
    title, facts = _headline(story)
    badge = f'<p class="label">{esc(plain(report.get("label")))}</p>' if story.trained else ""
    head = (
        f'<meta charset="utf-8"><title>{esc(title)}</title><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style>'
    )
    date = esc(plain(report.get("date")).replace("T", " "))
    command = "drex simulate" if report.get("timing") == MODELLED else "drex bench"
    said = f"<p><strong>{esc(verdict(report))}</strong></p>" if story.runs else ""
    top = f'<p class="over">{command} · {date}</p><h1>{esc(title)}</h1>{said}{badge}'
    figures = "".join(_figures(story))
    tables = "".join(_table(story, *part) for part in _tables(story)) if story.runs else ""
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{_warnings(story)}<header>{top}{facts}'
        f"{_about(report)}</header>{figures}<section><h2>All numbers</h2>{tables}</section></main>"
        f'<div id="tip" role="status" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )
