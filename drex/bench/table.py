"""The report of a benchmark as a terminal shows it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

LEGEND = (
    "Times in ms: request completion (mean, p99), first token, per token after it (means). out, in: involuntary exits "
    "and stays. same: tokens that equal full depth's."
)


def show(report: dict[str, Any], console: Console) -> None:
    """Print a table a count in flight, after what the numbers depend on."""
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
        console.print(_table(count, runs))
    console.print(LEGEND, style="dim", highlight=False)


def _table(count: int, runs: list[dict[str, Any]]) -> Table:
    best = runs[-1]
    caption = ", ".join(
        f"{name} {best[key]:.1f}"
        for name, key in (("full", "full"), ("θ*", "theta_star"), ("ideal", "ideal"))
        if best.get(key) is not None
    )
    below = f"decoding alone, tokens/s: {caption}" if caption else None
    table = Table(box=box.SIMPLE, title=f"{count} in flight", caption=below)
    columns = ("policy", "tok/s", "decode", "RCT", "p99", "TTFT", "TPOT", "depth", "out", "in", "same")
    for name in columns:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for run in runs:
        quality = run.get("quality") or {}
        table.add_row(
            run["policy"],
            _number(run["tokens_per_s"], ".0f"),
            _number(run.get("decode_tokens_per_s"), ".0f"),
            _number(run["rct_ms"]["mean"], ".0f"),
            _number(run["rct_ms"]["p99"], ".0f"),
            _number(run["ttft_ms"]["mean"], ".0f"),
            _number(run["tpot_ms"]["mean"], ".1f"),
            f"{run['mean_depth']:.1f}",
            str(run["involuntary_exits"]),
            str(run["involuntary_stays"]),
            _number(quality.get("token_agreement"), ".2f"),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
