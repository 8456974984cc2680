"""All measurements on a CUDA GPU, one section after the other; what is measured so far is always on disk.

See bench/gpu.sh. Random weights of real shapes with synthetic exit traces, labelled so.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_serving
import torch
from rich.console import Console
from rich.table import Table

from drex.comparison import machine
from drex.report.html import render

SECTIONS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "parity": gpu_kernels.parity,
    "check": gpu_kernels.exit_checks,
    "decode": gpu_kernels.decode,
    "peers": gpu_serving.peers,
    "policies": gpu_serving.policies,
    "run_ahead": gpu_serving.run_ahead,
    "idle": gpu_serving.idle,
}
console = Console(width=180)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--long", action="store_true", help="all shapes and counts in flight")
    parser.add_argument("--only", default=",".join(SECTIONS))
    return parser.parse_args()


def show(name: str, rows: list[dict[str, Any]], seconds: float) -> None:
    """A table of a section's numbers; nested ones are left to the JSON."""
    plain = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]
    columns = list(dict.fromkeys(key for row in plain for key in row))
    table = Table(*columns, title=f"{name} ({seconds:.0f} s)")
    for row in plain:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run, print, write."""
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU here: run this on a machine that has one")
    unknown = set(options.only.split(",")) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"unknown sections {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"benchmark": "gpu", **machine.describe(), "long": options.long, "sections": {}}
    for name in options.only.split(","):
        started = time.perf_counter()
        try:
            rows = SECTIONS[name](options.long)
        except Exception as error:  # the other sections still count
            console.print(traceback.format_exc(), style="red", markup=False)
            rows = [{"failed": f"{type(error).__name__}: {error}"}]
        seconds = time.perf_counter() - started
        for number, row in enumerate(rows):
            if "report" in row:
                page = options.out / f"{name}-{number}.html"
                page.write_text(render(row["report"]), encoding="utf-8")
        report["sections"][name] = {"seconds": seconds, "rows": rows}
        show(name, rows, seconds)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
