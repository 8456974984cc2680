"""`drex evaluate`: held-out loss, agreement and exit rates by threshold."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from drex.cli.common import (
    CriterionOption,
    DtypeOption,
    ExitsOption,
    KvFillOption,
    MaxModelLenOption,
    SweepOption,
    ThresholdsOption,
    check_at_least,
    check_share,
    hinting_at_sweep,
    parse_ints,
    sweep_from,
)
from drex.cli.output import OutputFile
from drex.config import EarlyExit
from drex.config.early_exit_json import spell_thresholds

if TYPE_CHECKING:
    from drex.tuning.evaluate import Quality

SWEEP = (0.3, 0.5, 0.7, 0.9)


def evaluate(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder or hub id; none: the bundled model.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text to score; may be given several times.")] = None,
    stdlib: Annotated[
        bool, typer.Option("--stdlib", help="The part of the standard library that drex train holds out.")
    ] = False,
    thresholds: ThresholdsOption = None,
    sweep: SweepOption = None,
    exits: ExitsOption = None,
    criterion: CriterionOption = None,
    kv_fill: KvFillOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    tokens: Annotated[int, typer.Option(help="About how many tokens to score.")] = 32768,
    held_out_share: Annotated[float, typer.Option(help="Of --stdlib, as in training.")] = 0.02,
    set_within: Annotated[
        float | None,
        typer.Option(
            help="Write the lowest threshold with a loss within this share of full depth to early_exit.json, in the "
            "model's folder."
        ),
    ] = None,
    confidences_file: Annotated[
        Path | None,
        typer.Option("--confidences", help="Write what each exit says of each token here, for drex simulate."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure what early exit costs in quality, teacher-forced, at several thresholds."""
    from drex.compute.load import inspect_model
    from drex.llm import LLM
    from drex.tuning.corpus import read_documents, split_held_out, standard_library
    from drex.tuning.early_exit_file import measured_exits
    from drex.tuning.evaluate import confidences, held_out_blocks, set_threshold
    from drex.tuning.evaluate import evaluate as run

    if bool(text) == stdlib:
        raise ValueError("name the text to score: either --text PATH or --stdlib")
    grid = sweep_from(thresholds, sweep, SWEEP)
    check_at_least(1, tokens=tokens)
    check_at_least(0, set_within=set_within)
    check_share(held_out_share=held_out_share)
    settings = EarlyExit(
        layers=None if exits is None else parse_ints(exits, "--exits"),
        thresholds=grid[0],
        criterion=criterion,
        kv_fill=kv_fill,
    )
    with hinting_at_sweep():
        facts = inspect_model(model, settings, "float32", "cpu")
    if set_within is not None:  # what can't be written is said before anything is measured
        measured_exits(facts.folder, facts.spec.num_layers, facts.exits)
    documents = split_held_out(standard_library(), held_out_share)[1] if stdlib else read_documents(text or ())
    with OutputFile(confidences_file, "--confidences") as confidences_out:
        llm = LLM(model, early_exit=settings, dtype=dtype, max_model_len=max_model_len, generation_config="none")
        blocks = held_out_blocks(llm, documents, tokens)
        if confidences_out.wanted:
            confidences_out.write("".join(json.dumps(each) + "\n" for each in confidences(llm, blocks)))
    measured = run(llm, blocks, grid)
    if as_json:
        typer.echo(json.dumps([asdict(quality) for quality in measured]))
    else:
        Console().print(_table(measured))
    if set_within is not None:
        layers = llm.model.decoder.spec.num_layers
        best = set_threshold(llm.model.folder, layers, measured, set_within, llm.model.exits)
        assert best.threshold is not None
        typer.echo(f"wrote threshold {spell_thresholds(best.threshold)} to early_exit.json", err=True)


def _table(measured: list[Quality]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("threshold", "loss", "vs full", "same", "exit", "depth"):
        table.add_column(name, justify="left" if name == "threshold" else "right", no_wrap=True)
    table.add_column("share by layer", overflow="fold")
    for quality in measured:
        table.add_row(
            "full depth" if quality.threshold is None else spell_thresholds(quality.threshold),
            f"{quality.loss:.4f}",
            f"{quality.loss_ratio - 1:+.2%}",
            f"{quality.agreement:.3f}",
            f"{quality.exit_share:.1%}",
            f"{quality.mean_depth:.2f}",
            ", ".join(f"{layer}: {share:.1%}" for layer, share in quality.exits.items()),
        )
    table.caption = "loss in nats a token; same: most likely tokens that are full depth's"
    return table
