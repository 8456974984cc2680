"""`drex advise`: does early exit pay here?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from drex.cli.common import (
    CriterionOption,
    DeviceOption,
    DtypeOption,
    ExitsOption,
    KvFillOption,
    MaxModelLenOption,
    parse_floats,
    parse_ints,
)
from drex.config import EarlyExit


def advise(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder or hub id; none: the bundled model.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text like your traffic; by default held-out standard-library code.")
    ] = None,
    thresholds: Annotated[str, typer.Option(help="To look at, each for all exits.")] = "0.4,0.5,0.6,0.7,0.8,0.9",
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
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from drex.bench.advise import advise as run
    from drex.llm import LLM
    from drex.tuning.corpus import read_documents, split_held_out, standard_library
    from drex.tuning.evaluate import held_out_blocks

    grid, counts = parse_floats(thresholds, "--thresholds"), parse_ints(in_flight, "--in-flight")
    settings = EarlyExit(
        layers=None if exits is None else parse_ints(exits, "--exits"),
        thresholds=grid[0],
        criterion=criterion,
        kv_fill=kv_fill,
    )
    llm = LLM(
        model,
        early_exit=settings,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max(*counts, 1),
        generation_config="none",
    )
    documents = read_documents(text) if text else split_held_out(standard_library(), 0.02)[1]
    found = run(llm, held_out_blocks(llm, documents, tokens), grid, counts, tolerance)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    table = Table(box=box.SIMPLE, title="predicted speed against full depth, by requests in flight")
    for name in ("exits", "thr.", "leave", "loss", "same", *map(str, counts)):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in found.outcomes:
        table.add_row(
            ",".join(map(str, outcome.exits)),
            f"{outcome.threshold:g}",
            " ".join(f"{rate:.0%}" for rate in outcome.exit_rates),
            f"{outcome.loss_ratio - 1:+.1%}",
            f"{outcome.agreement:.1%}",
            *("-" if gain is None else f"{gain:.2f}" for gain in outcome.gains.values()),
        )
    console = Console()
    console.print(table)
    console.print(found.text, style="bold", highlight=False)
