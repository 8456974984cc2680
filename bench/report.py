"""The engine benchmark's tables, results beside their targets."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

NEVER_BELOW = 0.95
AT_32 = 1.5
OWN_SHARE = 0.05
OWN_SHARE_OF = ("llama-160m", 32)
MB = 1e6


def print_report(found: dict[str, Any], console: Console) -> None:
    """Print what was measured; adds the verdicts on the targets to `found`."""
    found["targets"] = targets(found)
    at, versions = found["machine"], found["versions"]
    console.print(
        f"\n{found['date']}; {at['cpu']}, {at['cores']} cores, {at['threads']} threads, load {at['load_average'][0]}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        highlight=False,
    )
    asked = found["settings"]
    console.print(f"prompts: {asked['prompts']}; output tokens: {asked['output_tokens']}", highlight=False)
    if found["throughput"]:
        console.print(_throughput(found["throughput"]))
        console.print(_own_time(found["throughput"]))
    if found["memory"]:
        console.print(_memory(found["memory"]))
    if found["kv_saved"]:
        console.print(_kv_saved(found["kv_saved"]))
    for target in found["targets"]:
        holds = "[green]holds[/]" if target["holds"] else "[red]missed[/]"
        console.print(f"{holds}: {target['target']}: {target['measured']}", highlight=False)
    for skipped in found["skipped"]:
        console.print(f"skipped {skipped['what']}: {skipped['reason']}", style="yellow", markup=False, highlight=False)


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at, what came out, and whether it holds; only of what was measured."""
    checks: list[dict[str, Any]] = []

    def check(target: str, values: dict[str, float], good: bool, unit: str = "") -> None:
        if values:
            measured = ", ".join(f"{value:.3g}{unit} ({where})" for where, value in values.items())
            checks.append({"target": target, "measured": measured, "holds": good})

    ratios = {
        f"{cell['model']} {cell['dtype']} {cell['in_flight']}": cell["engines"]["transformers"]["drex_ratio"]
        for cell in found["throughput"]
    }
    lowest = dict(sorted(ratios.items(), key=lambda item: item[1])[:1])
    check(f"never below {NEVER_BELOW}x transformers", lowest, all(r >= NEVER_BELOW for r in lowest.values()))
    at_32 = {where: ratio for where, ratio in ratios.items() if where.endswith(" 32")}
    check(f"at least {AT_32}x transformers at 32", at_32, all(ratio >= AT_32 for ratio in at_32.values()))
    shares = {
        f"{cell['model']} {cell['dtype']}": 100 * cell["own_time"]["share"]
        for cell in found["throughput"]
        if (cell["model"], cell["in_flight"]) == OWN_SHARE_OF
    }
    check(
        f"under {OWN_SHARE:.0%} of a pass outside of the model at 32",
        shares,
        max(shares.values(), default=0) < 100 * OWN_SHARE,
        " %",
    )
    room = {f"{e['model']} {e['dtype']}": (e["limit"] - e["peak"]) / MB for e in found["memory"]}
    check("memory under imports + weights + K/V + 150 MB, room left", room, all(mb >= 0 for mb in room.values()), " MB")
    agree = {entry["fill"]: entry["held"] for entry in found["kv_saved"]}
    check(
        "slots held are the executed (token, layer) pairs", agree, all(entry["agrees"] for entry in found["kv_saved"])
    )
    return checks


def _throughput(cells: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Output tokens a second at full depth, medians; prompts included in the time",
        caption="x0.2: lengths times 0.2, but for prompts from a file. "
        "Per token computed: drex/transformers, unwanted tokens counted too.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("model", no_wrap=True)
    for name in ("in\nflight", "requests"):
        table.add_column(name, justify="right", no_wrap=True)
    engines = list(dict.fromkeys(name for cell in cells for name in cell["engines"]))
    for name in engines:
        table.add_column(name, justify="right")
        if name != "drex":
            table.add_column(f"drex/\n{name}", justify="right", no_wrap=True)
    table.add_column("per token\ncomputed", justify="right")
    for cell in cells:
        requests = f"{cell['requests']} x{cell['length_scale']:g}"
        row = [f"{cell['model']} {cell['dtype']}\n({cell['kind']})", str(cell["in_flight"]), requests]
        for name in engines:
            entry = cell["engines"].get(name)
            row.append(f"{entry['tokens_per_second']:.1f}" if entry else "-")
            if name != "drex":
                row.append(f"{entry['drex_ratio']:.2f}" if entry else "-")
        ours, theirs = (cell["engines"][name]["computed_tokens_per_second"] for name in ("drex", "transformers"))
        table.add_row(*row, f"{ours / theirs:.2f}")
    return table


def _own_time(cells: list[dict[str, Any]]) -> Table:
    table = Table(title="drex outside of the model: scheduling, bookkeeping, text, sampling; ms a pass")
    for name in ("model", "dtype", "in flight", "engine", "sampling", "whole pass", "share"):
        table.add_column(name, justify="right")
    for cell in cells:
        own = cell["own_time"]
        table.add_row(
            cell["model"],
            cell["dtype"],
            str(cell["in_flight"]),
            f"{own['engine_ms_per_pass']:.2f}",
            f"{own['sampling_ms_per_pass']:.2f}",
            f"{own['pass_ms']:.2f}",
            f"{own['share']:.1%}",
        )
    return table


def _memory(entries: list[dict[str, Any]]) -> Table:
    table = Table(title="Peak memory of a serving process, MB")
    for name in ("model", "dtype", "peak", "imports", "weights", "K/V pool", "+150: limit", "holds"):
        table.add_column(name, justify="right")
    for entry in entries:
        numbers = [f"{entry[key] / MB:.0f}" for key in ("peak", "imports", "weights", "kv_pool", "limit")]
        table.add_row(entry["model"], entry["dtype"], *numbers, "yes" if entry["holds"] else "no")
    return table


def _kv_saved(entries: list[dict[str, Any]]) -> Table:
    table = Table(title="K/V slots held at the end of decoding, of full depth's")
    for name in ("fill", "requests", "mean depth", "held", "expected", "held, decoded only", "expected, decoded only"):
        table.add_column(name, justify="right")
    for entry in entries:
        shares = [f"{entry[key]:.1%}" for key in ("held", "expected", "held_decode", "expected_decode")]
        table.add_row(entry["fill"], str(entry["requests"]), f"{entry['mean_depth']:.2f} of {entry['layers']}", *shares)
    return table
