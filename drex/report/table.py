"""The report of a benchmark as a terminal shows it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from drex.comparison.verdict import MODELLED, doubts, verdict

LEGEND = (
    "Times in ms: request completion (mean, p99), first token, per token after it (means). out, in: involuntary exits "
    "and stays. same: tokens that equal full depth's."
)
ENDLESS = 10_000
"""Columns that no table fills."""
MODELLED_LEGEND = "Times are modelled, not measured: the engine ran in virtual time."


def show(report: dict[str, Any], console: Console) -> None:
    """Print a table a count in flight, after what the numbers depend on, and last the verdict."""
    at, load = report["machine"], report["workload"]
    style = "" if report["label"] == "trained model" else "bold yellow"
    console.print(f"{report['model']}: {report['label']}, exits after {report['exit_layers']}", style=style)
    where = at.get("device") or at["cpu"]
    threads = f", {at['threads']} threads" if at["threads"] else ""
    console.print(
        f"{where}{threads}, {report.get('dtype', '')}, {report['date']}; {load['kind']} loop, "
        f"{load['requests']} requests at the first count, K/V fill {report['kv_fill']}",
        style="dim",
        highlight=False,
    )
    for count in sorted({run["in_flight"] for run in report["runs"]}):
        runs = [run for run in report["runs"] if run["in_flight"] == count]
        table = _table(count, runs, gap=1)
        if console.measure(table, options=console.options.update(width=ENDLESS)).maximum > console.width:
            table = _table(count, runs, gap=0)
        console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    if report.get("timing") == MODELLED:
        console.print(MODELLED_LEGEND, style="bold yellow", highlight=False)
    doubt = doubts(report)
    if doubt is not None:
        console.print(doubt, style="bold yellow", highlight=False)
    console.print(verdict(report), style="bold", highlight=False)


def _table(count: int, runs: list[dict[str, Any]], gap: int) -> Table:
    best = runs[-1]
    caption = ", ".join(
        f"{name} {best[key]:.1f}"
        for name, key in (("full", "full"), ("θ*", "theta_star"), ("ideal", "ideal"))
        if best.get(key) is not None
    )
    below = f"decoding alone, tokens/s: {caption}" if caption else None
    table = Table(box=box.SIMPLE, title=f"{count} in flight", caption=below, pad_edge=False, padding=(0, gap, 0, 0))
    columns = ("policy", "tok/s", "decode", "RCT", "p99", "TTFT", "TPOT", "depth", "out", "in", "same")
    for name in columns:
        # Figures stay whole where a terminal is narrow; a policy's name gives way.
        left = name == "policy"
        table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for run in runs:
        quality = run.get("quality") or {}
        table.add_row(
            run["policy"],
            _number(run["tokens_per_s"], ".0f"),
            _number(run.get("decode_tokens_per_s"), ".0f"),
            *(
                _number(run[f"{kind}_ms"][at], ".0f")
                for kind, at in (("rct", "mean"), ("rct", "p99"), ("ttft", "mean"))
            ),
            _number(run["tpot_ms"]["mean"], ".1f"),
            f"{run['mean_depth']:.1f}",
            str(run["involuntary_exits"]),
            str(run["involuntary_stays"]),
            _number(quality.get("token_agreement"), ".2f"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
