"""`drex info`: what a model is to drex: segments, exits, sizes, and memory for K/V."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from drex.cli.common import (
    CriterionOption,
    DtypeOption,
    ExitsOption,
    KvFillOption,
    MaxModelLenOption,
    ThresholdsOption,
    early_exit_from,
)

if TYPE_CHECKING:
    from drex.compute.load import ModelFacts

MEBIBYTE = 2**20


def info(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder or hub id; none: the bundled model.")] = None,
    exits: ExitsOption = None,
    thresholds: ThresholdsOption = None,
    criterion: CriterionOption = None,
    kv_fill: KvFillOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show a model's segments, exits, sizes and K/V memory."""
    from drex.compute.load import inspect_model

    settings = early_exit_from(exits, thresholds, criterion, kv_fill, False)
    facts = describe(inspect_model(model, settings, dtype, "auto"), max_model_len)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _print(facts)


def describe(found: ModelFacts, max_model_len: int | None = None) -> dict[str, Any]:
    """The facts as JSON-ready values; sizes in bytes, as they are once loaded. No weights are read.

    Args:
        found: of the model.
        max_model_len: tokens of a request; None is what the engine takes by default.

    Raises:
        ValueError: weights that can't be served, or a length that the model does not have.
    """
    from drex.compute.load import request_length
    from drex.compute.weight_files import TensorFiles

    spec, plan, size = found.spec, found.exits, found.dtype.itemsize
    slot = spec.kv_values_per_slot * size
    segments: list[dict[str, Any]] = []
    first = 0
    for number, length in enumerate(found.layout.lengths):
        entry: dict[str, Any] = {"layers": [first + 1, first + length], "kv_bytes_per_token": slot * length}
        if number < len(plan.exits):
            entry |= {"head": plan.exits[number].head, "threshold": plan.rule.thresholds[number]}
        else:
            entry |= {"head": "final", "threshold": None}
        segments.append(entry)
        first += length
    length = request_length(spec, max_model_len)
    parameters = TensorFiles(found.folder).numel()
    head_files = sorted({spec.weights for spec in plan.exits if spec.weights})
    return {
        "model": found.folder.name,
        "type": spec.model_type,
        "dtype": str(found.dtype).removeprefix("torch."),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "vocab_size": spec.vocab_size,
        "max_model_len": length,
        "parameters": parameters,
        "weight_bytes": parameters * size,
        "exit_head_bytes": TensorFiles(found.folder, head_files).numel() * size,
        "criterion": plan.rule.criterion,
        "kv_fill": plan.kv_fill,
        "segments": segments,
        "kv_bytes_per_token": slot * spec.num_layers,
        "kv_bytes_per_request": slot * spec.num_layers * length,
    }


def _print(facts: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"[bold]{facts['model']}[/bold]: {facts['type']}, {facts['parameters'] / 1e6:.1f} M parameters, "
        f"{facts['layers']} layers, hidden {facts['hidden_size']}, {facts['heads']} heads "
        f"({facts['kv_heads']} for K/V), vocabulary {facts['vocab_size']}"
    )
    console.print(
        f"weights {facts['weight_bytes'] / MEBIBYTE:.1f} MiB in {facts['dtype']}, exit heads "
        f"{facts['exit_head_bytes'] / MEBIBYTE:.2f} MiB; K/V {facts['kv_bytes_per_token'] / 1024:.1f} KiB a token, "
        f"{facts['kv_bytes_per_request'] / MEBIBYTE:.1f} MiB a request of {facts['max_model_len']} tokens"
    )
    if len(facts["segments"]) > 1:
        console.print(f"criterion {facts['criterion']}, K/V of skipped layers: {facts['kv_fill']}")
    table = Table("segment", "layers", "head at its end", "threshold", "K/V a token")
    for number, segment in enumerate(facts["segments"]):
        threshold = segment["threshold"]
        table.add_row(
            str(number),
            "{}-{}".format(*segment["layers"]),
            segment["head"],
            "-" if threshold is None else f"{threshold:g}",
            f"{segment['kv_bytes_per_token'] / 1024:.1f} KiB",
        )
    console.print(table)
