"""`drex advise`: does early exit pay here?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
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
    SweepOption,
    ThresholdsOption,
    check_at_least,
    hinting_at_sweep,
    parse_ints,
    sweep_from,
)
from drex.config import EarlyExit
from drex.config.early_exit_json import spell_thresholds

if TYPE_CHECKING:
    from rich.table import Table

    from drex.comparison.advise import Advice

SWEEP = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COUNTS_ABREAST = 6
"""In-flight counts that a table has room for; more go below."""


def advise(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder or hub id; none: the bundled model.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text like your traffic; by default held-out standard-library code.")
    ] = None,
    thresholds: ThresholdsOption = None,
    sweep: SweepOption = None,
    in_flight: Annotated[str, typer.Option(help="Requests in flight to predict for.")] = "1,4,8,16,32,64",
    tolerance: Annotated[float, typer.Option(help="Share by which the loss may grow.")] = 0.02,
    tokens: Annotated[int, typer.Option(help="About how many tokens to measure exit rates on.")] = 8192,
    exits: ExitsOption = None,
    criterion: CriterionOption = None,
    kv_fill: KvFillOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_model_len: MaxModelLenOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say whether early exit pays for a model on this machine, at which threshold, and how much."""
    from rich.console import Console

    from drex.comparison.advise import advise as run
    from drex.llm import LLM
    from drex.profiling.profile_cache import MEASURED
    from drex.tuning.corpus import read_documents, split_held_out, standard_library
    from drex.tuning.evaluate import held_out_blocks

    grid, counts = sweep_from(thresholds, sweep, SWEEP), parse_ints(in_flight, "--in-flight", least=1)
    check_at_least(0, tolerance=tolerance)
    check_at_least(1, tokens=tokens)
    settings = EarlyExit(
        layers=None if exits is None else parse_ints(exits, "--exits"),
        thresholds=grid[0],
        criterion=criterion,
        kv_fill=kv_fill,
    )
    documents = read_documents(text) if text else split_held_out(standard_library(), 0.02)[1]
    with hinting_at_sweep():
        llm = LLM(
            model,
            early_exit=settings,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max(counts),
            profile=MEASURED,
            generation_config="none",
        )
    found = run(llm, held_out_blocks(llm, documents, tokens), grid, counts, tolerance)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    console = Console()
    for start in range(0, len(counts), COUNTS_ABREAST):
        console.print(_table(found, counts[start : start + COUNTS_ABREAST]))
    console.print(found.text, style="bold", highlight=False)


def _table(found: Advice, counts: Sequence[int]) -> Table:
    """A table of the settings that were compared: the predicted gain of each, by requests in flight."""
    from rich import box
    from rich.table import Table

    title = "predicted speed against full depth, by requests in flight"
    table = Table(box=box.SIMPLE, title=title, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("exits", "thr.", "leave", "loss", "same"):
        # Many exit points take several lines.
        table.add_column(name, justify="right", overflow="fold")
    for count in counts:
        table.add_column(str(count), justify="right", no_wrap=True)
    for outcome in found.outcomes:
        gains = [outcome.gains[count] for count in counts]
        table.add_row(
            ",".join(map(str, outcome.exits)),
            spell_thresholds(outcome.threshold),
            " ".join(f"{rate:.0%}" for rate in outcome.exit_rates),
            f"{outcome.loss_ratio - 1:+.1%}",
            f"{outcome.agreement:.1%}",
            *("-" if gain is None else f"{gain:.2f}" for gain in gains),
        )
    return table
