"""What an open-loop run found, with the keys of vLLM's benchmark: times in milliseconds, throughput, goodput."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from drex.load_test.load import Outcome

KINDS = {"ttft": "time to first token", "tpot": "time per output token", "itl": "gap between pieces", "e2el": "RCT"}
"""Of times. A server may send several tokens in one piece."""


def parse_goodput(given: Sequence[str]) -> dict[str, float]:
    """'ttft:500' and the like -> milliseconds by kind; raises ValueError for anything else."""
    targets = {}
    for text in given:
        kind, _, number = text.partition(":")
        try:
            targets[kind] = float(number)
        except ValueError:
            targets[kind] = -1.0
        if kind not in ("ttft", "tpot", "e2el") or not targets[kind] > 0:
            raise ValueError(f"--goodput {text!r}: give ttft, tpot or e2el and milliseconds, as in ttft:500")
    return targets


def summarise(outcomes: Sequence[Outcome], seconds: float, targets: Mapping[str, float]) -> dict[str, Any]:
    """The report of a run.

    Args:
        outcomes: of all its requests.
        seconds: that it took.
        targets: milliseconds by kind; a request that meets all of them counts for goodput.
    """
    good = [one for one in outcomes if one.error is None]
    each = [_times(one) for one in good]
    values = {kind: [times[kind] for times in each if kind in times] for kind in ("ttft", "tpot", "e2el")}
    values["itl"] = [gap * 1e3 for one in good for gap in one.gaps]
    made, given = sum(one.tokens for one in good), sum(one.prompt_tokens for one in good)
    met = sum(all(times.get(kind, 0.0) <= most for kind, most in targets.items()) for times in each)
    report: dict[str, Any] = {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": dict(Counter(one.error for one in outcomes if one.error is not None).most_common(5)),
        "duration": seconds,
        "total_input_tokens": given,
        "total_output_tokens": made,
        "request_throughput": len(good) / seconds,
        "output_throughput": made / seconds,
        "total_token_throughput": (given + made) / seconds,
        "request_goodput": met / seconds if targets else None,
        "goodput_share": met / len(outcomes) if targets else None,
    }
    for kind in KINDS:
        report |= _quantiles(kind, values[kind])
    return report


def _times(one: Outcome) -> dict[str, float]:
    """Milliseconds by kind; a single token has no time per token after it."""
    assert one.first is not None
    assert one.last is not None
    times = {"ttft": one.first * 1e3, "e2el": one.last * 1e3}
    if one.tokens > 1:
        times["tpot"] = (one.last - one.first) * 1e3 / (one.tokens - 1)
    return times


def _quantiles(kind: str, values: Sequence[float]) -> dict[str, float | None]:
    names = [f"{name}_{kind}_ms" for name in ("mean", "median", "p95", "p99")]
    if not values:
        return dict.fromkeys(names)
    found = [float(np.mean(values)), *(float(value) for value in np.percentile(values, (50, 95, 99)))]
    return dict(zip(names, found, strict=True))


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print a run."""
    said = f"{report['completed']} requests done, {report['failed']} failed, in {report['duration']:.1f} s"
    console.print(f"{report['model_id']} at {report['endpoint']}: {said}", highlight=False)
    for error, count in report["errors"].items():
        console.print(f"  {count} x {error}", style="yellow", highlight=False, markup=False)
    table = Table(box=box.SIMPLE)
    for name in ("ms", "mean", "median", "p95", "p99"):
        table.add_column(name, justify="left" if name == "ms" else "right")
    for kind, text in KINDS.items():
        cells = [report[f"{name}_{kind}_ms"] for name in ("mean", "median", "p95", "p99")]
        table.add_row(text, *("-" if value is None else f"{value:.1f}" for value in cells))
    console.print(table)
    goodput = report["request_goodput"]
    met = "" if goodput is None else f", goodput {goodput:.2f} requests/s ({report['goodput_share']:.0%})"
    console.print(
        f"{report['output_throughput']:.1f} output tokens/s, {report['request_throughput']:.2f} requests/s{met}",
        highlight=False,
    )
