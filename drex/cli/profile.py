"""`drex profile`: measure what passes take here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drex.cli.common import (
    CriterionOption,
    DeviceOption,
    DtypeOption,
    ExitsOption,
    KvFillOption,
    MaxModelLenOption,
    ThresholdsOption,
    check_at_least,
    early_exit_from,
)
from drex.cli.output import OutputFile

if TYPE_CHECKING:
    from rich.table import Table

    from drex.control.cost.profile import Profile


def profile(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder or hub id; none: the bundled model.")] = None,
    exits: ExitsOption = None,
    thresholds: ThresholdsOption = None,
    criterion: CriterionOption = None,
    kv_fill: KvFillOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests in flight to measure up to.")] = 64,
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default the number that is fastest.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the profile to this file, for others to start from.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure even if a fresh profile is kept.")] = False,
) -> None:
    """Measure what passes take on this machine, and show it; engines with the same settings start from it."""
    from rich.console import Console

    from drex.llm import LLM
    from drex.profiling.profile_cache import MEASURE, MEASURED

    check_at_least(1, max_num_seqs=max_num_seqs, threads=threads)
    settings = early_exit_from(exits, thresholds, criterion, kv_fill, False)
    with OutputFile(out, "--out") as file:
        found = LLM(
            model,
            early_exit=settings,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            threads=threads,
            profile=MEASURE if again else MEASURED,
            generation_config="none",
        ).profile
        Console().print(_table(found, max_num_seqs))
        if file.wanted:
            file.write(json.dumps(found.to_dict()) + "\n")


def _table(found: Profile, most: int) -> Table:
    """What passes of up to so many rows take."""
    import numpy as np
    from rich.table import Table

    table = Table(
        "segment", "rows", "layers (ms)", "head (ms)", title=f"{found.source}, {found.threads or '-'} threads"
    )
    for number, cost in enumerate(found.segments):
        for rows in (1, 4, 8, 16, 32, 64):
            if rows <= most:
                layers, head = (float(curve.at(np.float64(rows))) * 1e3 for curve in (cost.rows, cost.head))
                table.add_row(str(number) if rows == 1 else "", str(rows), f"{layers:.3f}", f"{head:.3f}")
        table.add_row("", "", f"+ {cost.span * 1e6:.1f} µs a request", f"{cost.entry * 1e9:.1f} ns a K/V entry")
        table.add_section()
    return table
